"""Loading: from a name to an empty model of its shape, and from there to its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from ..errors import LoadError
from ._adapters import add_empty, base_of, load

_BUNDLED = Path(__file__).parent.parent / "_bundled"
_CONFIG_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder")
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
        self._options = options
        self._adapter: str | None = options.pop("peft", None)
        base = base_of(self.location)
        if base is not None:
            self._adapter, self.location = self.location, resolve(base)
        self.revision: str | None = options.get("revision")
        self.config = self._load_config(options.pop("config", None))
        self._class = choose_class(self.config, kinds)

    def _load_config(self, config: Any) -> Any:
        from transformers import AutoConfig

        if config is not None:
            return config
        options = {key: self._options[key] for key in _CONFIG_OPTIONS if key in self._options}
        try:
            return AutoConfig.from_pretrained(self.location, **options)
        except (OSError, ValueError) as error:
            raise LoadError(_NOT_FOUND.format(name=self.name, reason=first_line(error))) from error

    def load_processor(self, kind: str) -> Any:
        """The model's own tokenizer ("AutoTokenizer") or processor ("AutoProcessor")."""
        import transformers

        options = {key: self._options[key] for key in _CONFIG_OPTIONS if key in self._options}
        try:
            return getattr(transformers, kind).from_pretrained(self.location, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            what = kind.removeprefix("Auto").lower()
            raise LoadError(_NO_PROCESSOR.format(what=what, name=self.name, reason=first_line(error))) from error

    def build_empty(self) -> Module:
        """The model's modules on the meta device: shapes, no weights."""
        allowed = {name: self._options[name] for name in _SHAPE_OPTIONS if self._options.get(name, "auto") != "auto"}
        build = getattr(self._class, "from_config", None) or self._class._from_config
        with torch.device("meta"):
            model = build(self.config, **allowed)
            if self._adapter is not None:
                add_empty(model, self._adapter)
            return model.eval()

    def load(self) -> Module:
        """The model with its weights."""
        try:
            with _quiet_progress(self.location != self.name):
                model = self._class.from_pretrained(self.location, config=self.config, **self._options)
                if self._adapter is not None:
                    load(model, self._adapter)
                return model.eval()
        except OSError as error:
            raise LoadError(_NOT_FOUND.format(name=self.name, reason=first_line(error))) from error


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


_NO_PROCESSOR = """\
The {what} of {name!r} could not be loaded ({reason}). Pass {what}=… where you make the model, or give it tensors."""

_NOT_SERVED = """\
{kinds} of transformers does not serve a model with {config}: choose another task=… or auto_class=…, or none, which \
takes the class that the model was saved from."""

_NOT_FOUND = """\
The model {name!r} could not be loaded: {reason}
Give the name of a model on the hub (with network, or in the local cache), a local folder, a module of your own \
(built or loaded as you like), or "nnsight/landmarks", which comes with the package."""
