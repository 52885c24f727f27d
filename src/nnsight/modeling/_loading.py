"""Loading: from a name to an empty model of its shape, and from there to its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from ..errors import LoadError

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

    def __init__(self, name: str, auto_class: str, options: dict[str, Any]) -> None:
        self.name = name
        self.location = resolve(name)
        self._auto_class = auto_class
        self.options = dict(options)
        self._options = options
        self.revision: str | None = options.get("revision")
        self.config = self._load_config(options.pop("config", None))

    def _load_config(self, config: Any) -> Any:
        from transformers import AutoConfig

        if config is not None:
            return config
        options = {key: self._options[key] for key in _CONFIG_OPTIONS if key in self._options}
        try:
            return AutoConfig.from_pretrained(self.location, **options)
        except (OSError, ValueError) as error:
            raise LoadError(_NOT_FOUND.format(name=self.name, reason=_first_line(error))) from error

    def load_tokenizer(self) -> Any:
        """The model's own tokenizer, None where it has none."""
        from transformers import AutoTokenizer

        options = {key: self._options[key] for key in _CONFIG_OPTIONS if key in self._options}
        try:
            return AutoTokenizer.from_pretrained(self.location, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise LoadError(
                f"The tokenizer of {self.name!r} could not be loaded ({_first_line(error)}). Pass tokenizer=…, or give "
                "the model token ids."
            ) from error

    def build_empty(self) -> Module:
        """The model's modules on the meta device: shapes, no weights."""
        import transformers

        auto = getattr(transformers, self._auto_class)
        allowed = {name: self._options[name] for name in _SHAPE_OPTIONS if self._options.get(name, "auto") != "auto"}
        with torch.device("meta"):
            return auto.from_config(self.config, **allowed).eval()

    def load(self) -> Module:
        """The model with its weights."""
        import transformers

        auto = getattr(transformers, self._auto_class)
        try:
            with _quiet_progress(self.location != self.name):
                return auto.from_pretrained(self.location, config=self.config, **self._options).eval()
        except OSError as error:
            raise LoadError(_NOT_FOUND.format(name=self.name, reason=_first_line(error))) from error


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


_NOT_FOUND = """\
The model {name!r} could not be loaded: {reason}
Give the name of a model on the hub (with network, or in the local cache), a local folder, a module of your own \
(LanguageModel(module, tokenizer=...)), or "nnsight/landmarks", which comes with the package."""
