"""The OpenAPI description of the service, with the schemas of its messages."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ..protocol import JobList, JobState, ModelOrder, Person, Refusal, ServerInfo, versions

_MESSAGES = (JobList, JobState, ModelOrder, Person, Refusal, ServerInfo)
_OPEN = frozenset({"/metrics", "/v1/status"})  # what needs no key
_REFUSALS = {
    400: "The body is no job, or one of another version.",
    401: "The key is unknown.",
    403: "Only administrators may.",
    404: "There is none, or it is somebody else's.",
    409: "It is served already, or has no room within the memory budget.",
    413: "Too many bytes; with Retry-After where room will be made.",
    429: "Too many jobs of yours wait or run; see Retry-After.",
    503: "The server is ending, or cannot keep jobs now; see Retry-After.",
}
_TEXT = """\
Blocks of Python that run inside a model on this server. `nnsight` is the client: what it sends and receives as
`application/octet-stream` are frames of its protocol. Everything a user asks about is the user's own."""


def responses(content: str | None, *refusals: int, code: int = 200) -> dict[int | str, dict[str, Any]]:
    """What a route answers: a message by name, a media type, or nothing; and the refusals it may give."""
    found: dict[int | str, dict[str, Any]] = {number: _refusal(number) for number in refusals}
    found[code] = (
        {"description": "Done."} if content is None else {"description": "Done.", "content": _content(content)}
    )
    return found


def _refusal(number: int) -> dict[str, Any]:
    header = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    more = {"headers": header} if number in (413, 429, 503) else {}
    return {"description": _REFUSALS[number], "content": _content("Refusal"), **more}


def _content(name: str) -> dict[str, Any]:
    if "/" in name:
        return {name: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole description."""
    found = get_openapi(title="nnsight", version=versions().nnsight, description=_TEXT, routes=app.routes)
    _, schemas = msgspec.json.schema_components(_MESSAGES, ref_template="#/components/schemas/{name}")
    found["components"] = {
        "schemas": schemas | found.get("components", {}).get("schemas", {}),
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    for path, methods in found["paths"].items():
        for method in methods.values():
            method.get("responses", {}).pop("422", None)  # numbers in a query that are none
            method["security"] = [] if path in _OPEN else [{"key": []}]
    return found
