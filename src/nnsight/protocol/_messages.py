"""The messages between client, server and runner."""

from __future__ import annotations

from typing import Literal

import msgspec

from ._nodes import Container, Value
from ._tensors import TensorInfo

VERSION = 1  # of the messages' form; both sides must have the same
Method = Literal["trace", "generate", "scan", "session"]
Status = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = frozenset({"done", "failed", "cancelled"})


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message; those with tensors have the table of what follows them."""


class BlockText(Message):
    """A captured block; see `_capture.Block`."""

    source: str
    filename: str
    first_line: int
    function: str
    target: str | None
    line: int
    margins: list[int]
    owner: str | None
    first_argument: str | None
    flags: int
    names_read: list[str]
    names_bound: list[str]
    names_global: list[str]


class BoundBlock(Message, tag="block"):
    """A block with the variables it sees: those of its function, unbound ones without a value, and its globals."""

    block: BlockText
    names: list[str]
    variables: dict[str, Value]
    namespace: int


class Namespace(Message):
    """The global names of one of the user's modules, as far as the job reads them."""

    name: str
    values: dict[str, Value] = {}


class Definition(Message):
    """A function or class as source, at `first_line` of `filename`; `free` are the variables around it."""

    name: str
    namespace: int
    source: str
    filename: str
    first_line: int
    free: dict[str, Value] = {}


class ModuleText(Message):
    """A registered module."""

    name: str
    filename: str
    source: str


class StoredIntervention(Message, tag="intervention"):
    """An intervention as data, an object with `prepare`."""

    value: Value


class ModelState(Message):
    """A model object that the block names: the served model with these edits and names."""

    edits: list[BoundBlock | StoredIntervention] = []
    rename: dict[str, str] | None = None


class Job(Message, tag="job", omit_defaults=True):
    """A block to run on a served model; `engine` says whose modules the block means: transformers', or "vllm"."""

    version: int
    model: str
    revision: str | None
    method: Method
    main: BoundBlock
    args: list[Value]
    kwargs: dict[str, Value]
    models: list[ModelState]
    namespaces: list[Namespace]
    definitions: list[Definition]
    modules: list[ModuleText]
    containers: list[Container]
    tensors: list[TensorInfo]
    grad: bool = True
    inference: bool = False
    strict_order: bool = False
    seed: int = 0
    timeout: float = 600.0
    solo: bool = False
    engine: str = ""


class Line(Message):
    """One line of a traceback; columns where the Python that ran it knows them."""

    filename: str
    number: int
    function: str
    columns: tuple[int, int] | None = None


class Failure(Message, tag="failure"):
    """An exception: its class by module and name, its text, and the user's lines it came through."""

    module: str
    name: str
    text: str
    args: list[str | int | float | bool | None] = []
    lines: list[Line] = []
    notes: list[str] = []
    cause: Failure | None = None
    defined: int | None = None  # the number of the job's definition that the class is


class Change(Message):
    """A container or tensor that the job sent, and that the block changed in place.

    `value` is a tensor with the new numbers, or a container with the new contents.
    """

    index: int
    tensor: bool
    value: Value


class Answer(Message, tag="answer"):
    """What a finished block leaves: the saved names, and those that are not saved."""

    names: dict[str, Value]
    unsaved: list[str]
    changes: list[Change]
    containers: list[Container]
    tensors: list[TensorInfo]


class Event(Message):
    """Something that happened while a job ran: a printed text, or a warning with the user's line."""

    kind: Literal["print", "warning"]
    text: str
    category: str = ""
    filename: str = ""
    line: int = 0


class Shared(Message):
    """What jobs that were run together have left, each by itself; None where it must be run alone."""

    answers: list[bytes | None]
    events: list[list[Event]]


class JobState(Message):
    """Where a job stands, and its events after the ones the client has."""

    id: str
    status: Status
    position: int
    events: list[Event]
    next_event: int
    error: Failure | None = None


class JobSummary(Message):
    """One of a user's jobs in a list; times are seconds since 1970."""

    id: str
    model: str
    status: Status
    position: int
    created: float
    ended: float | None


class JobList(Message):
    """The jobs of a user."""

    jobs: list[JobSummary]


class Versions(Message):
    """What the server runs."""

    nnsight: str
    torch: str
    transformers: str
    python: str
    protocol: int


class ModelInfo(Message):
    """A served model: whether a replica of it can take jobs, how many jobs wait for it and run on it.

    `failure` says that it is not there, and to administrators why.  `tier` is `hot` (loaded), `warm` (its processes are
    there, without weights) or `cold`; a job for one that is not hot has it loaded.  `engine` is "vllm" where that computes it.
    """

    name: str
    revision: str | None
    running: bool
    queued: int
    active: int = 0
    replicas: int = 1
    ready: int = 0
    failure: str | None = None
    tier: str = "hot"
    engine: str = ""


class ModelOrder(Message):
    """A model to serve: its name, with @revision where one is meant."""

    model: str


class ServerInfo(Message):
    """What the server offers."""

    versions: Versions
    models: list[ModelInfo]
    trusted: bool
    limits: dict[str, int]
    started: float = 0.0


class Person(Message):
    """Whose key it is."""

    name: str


class Refusal(Message):
    """Why the server did not do as asked."""

    reason: str
