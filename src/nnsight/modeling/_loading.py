"""Loading: from a name to an empty model of its shape, and from there to its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from ..errors import InputError, LoadError
from ._adapters import Adapter

_BUNDLED = Path(__file__).parent.parent / "_bundled"
_CONFIG_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder")
_BAD_OPTIONS = (ValueError, TypeError, AttributeError, ImportError)  # what transformers raises for them
_SHAPE_OPTIONS = ("trust_remote_code", "attn_implementation", "dtype", "torch_dtype")


def resolve(name: str) -> str:
    """The folder of a model that comes with the package, or the name itself."""
    if name.startswith("nnsight/"):
        folder = _BUNDLED / name.removeprefix("nnsight/")
        if not folder.is_dir():
            known = ", ".join(f"nnsight/{path.parent.name}" for path in sorted(_BUNDLED.glob("*/config.json")))
            raise LoadError(f"There is no bundled model {name!r}; there is: {known}.")
        return str(folder)
    if name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise LoadError(_NOT_FOUND.format(name=name, reason="there is no such folder."))
        return str(folder)
    return name


class Source:
    """Where a model comes from: a name or folder, and the options of `from_pretrained`."""

    def __init__(self, name: str, kinds: Sequence[str], options: dict[str, Any]) -> None:
        self.name = name
        self.location = resolve(name)
        self.options = dict(options)
        options["trust_remote_code"] = bool(options.get("trust_remote_code"))  # else transformers asks on the terminal
        self._options = options
        adapter = options.pop("peft", None)
        self._adapter = None if adapter is None else Adapter(adapter, self._file_options("token", "cache_dir"))
        self.revision: str | None = options.get("revision")
        config = options.pop("config", None)
        self.config = self._load_config() if config is None else config
        self._class = choose_class(self.config, kinds)

    def _load_config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.location, **self._file_options())
        except (OSError, ValueError) as error:
            found = Adapter.alone(self.location, self._file_options()) if self._adapter is None else None
            if found is None:
                raise self._not_found(error) from error
        self._adapter, base = found
        self.location = resolve(base)
        for name in ("revision", "subfolder"):  # the adapter's
            self._options.pop(name, None)
        return self._load_config()

    def _file_options(self, *names: str) -> dict[str, Any]:
        return {key: self._options[key] for key in names or _CONFIG_OPTIONS if key in self._options}

    def load_processor(self, kind: str) -> Any:
        """The model's own tokenizer ("AutoTokenizer") or processor ("AutoProcessor")."""
        import transformers

        try:
            return getattr(transformers, kind).from_pretrained(self.location, **self._file_options())
        except (OSError, ValueError, KeyError, ImportError) as error:
            what = kind.removeprefix("Auto").lower()
            raise LoadError(_NO_PROCESSOR.format(what=what, name=self.name, reason=first_line(error))) from error

    def build_empty(self) -> Module:
        """The model's modules on the meta device: shapes, no weights."""
        given = {name: self._options.get(name) for name in _SHAPE_OPTIONS}
        options = {name: value for name, value in given.items() if value is not None and value != "auto"}
        build = getattr(self._class, "from_config", None)
        if build is None:  # a class of transformers' own
            build = self._class._from_config
            del options["trust_remote_code"]
        with torch.device("meta"):
            try:
                model = build(self.config, **options)
            except _BAD_OPTIONS as error:
                raise self._refused(error) from error
            if self._adapter is not None:
                self._adapter.add_empty(model)
            return model.eval()

    def load(self) -> Module:
        """The model with its weights."""
        try:
            with _quiet_progress(self.location != self.name):
                model = self._class.from_pretrained(self.location, config=self.config, **self._options)
        except OSError as error:
            raise self._not_found(error) from error
        except _BAD_OPTIONS as error:
            raise self._refused(error) from error
        if self._adapter is not None:
            with _quiet_progress(True):
                self._adapter.load(model)
        return model.eval()

    def _refused(self, error: Exception) -> LoadError:
        options = [f"{name}={value!r}" for name, value in self._options.items() if name in self.options]
        return LoadError(
            _REFUSED.format(name=self.name, options=", ".join(options) or "none", reason=first_line(error))
        )

    def _not_found(self, error: Exception) -> LoadError:
        if "trust_remote_code" in str(error):
            return LoadError(_CUSTOM_CODE.format(name=self.name))
        return LoadError(_NOT_FOUND.format(name=self.name, reason=first_line(error)))


def choose_class(config: Any, kinds: Sequence[str]) -> Any:
    """The first of these classes of transformers that serves this config; without any, the one it was saved from."""
    import transformers

    if not kinds:
        kinds = [*(getattr(config, "architectures", None) or ()), "AutoModel"]
    known = [found for kind in kinds if (found := getattr(transformers, kind, None)) is not None]
    if not known:
        raise LoadError(f"transformers has no class {' or '.join(map(repr, kinds))}: give another auto_class or task.")
    for found in known:
        mapping = getattr(found, "_model_mapping", None)
        remote = getattr(config, "auto_map", None) or {}
        if mapping is None or type(config) in mapping or found.__name__ in remote:
            return found
    raise LoadError(_NOT_SERVED.format(config=type(config).__name__, kinds=" or ".join(kinds)))


def refuse_options(options: Collection[str]) -> None:
    """Refuse what is about loading where a module is given, which is used as it stands."""
    if "peft" in options:
        raise InputError(_LOADED_ADAPTER)
    if options:
        raise InputError(_LOADED.format(options=", ".join(f"{name}=…" for name in options)))


@contextmanager
def _quiet_progress(quiet: bool) -> Iterator[None]:
    """No progress bar for a model that is there in a moment."""
    from transformers.utils import logging

    if not (quiet and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


_LOADED = """\
{options} is about loading, and a module of your own is used as it stands: give it to `from_pretrained` where you make the \
module, or give a name or a folder in place of the module."""

_LOADED_ADAPTER = """\
peft=… is about loading, and a module of your own is used as it stands: give the module its adapter first, with \
`peft.PeftModel.from_pretrained(module, adapter)`."""

_NO_PROCESSOR = """\
The {what} of {name!r} could not be loaded ({reason}). Pass {what}=… where you make the model, or give it tensors."""

_REFUSED = """\
transformers could not make the model {name!r} with these options ({options}): {reason}"""

_CUSTOM_CODE = """\
The model {name!r} brings Python code of its own, which is not run unasked. Read it, and pin it: \
trust_remote_code=True, revision="the commit that you have read"."""

_NOT_SERVED = """\
{kinds} of transformers does not serve a model with {config}: choose another task=… or auto_class=…, or none, which \
takes the class that the model was saved from."""

_NOT_FOUND = """\
The model {name!r} could not be loaded: {reason}
Give the name of a model on the hub (with network, or in the local cache), a local folder, a module of your own \
(built or loaded as you like), or "nnsight/landmarks", which comes with the package."""
