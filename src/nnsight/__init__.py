"""nnsight: read and change what happens inside any PyTorch model while it runs."""

from typing import TYPE_CHECKING, Any

from ._patches import unmount as unmount
from .config import CONFIG as CONFIG
from .envoy import Envoy as Envoy
from .envoy import View as View
from .modeling import DiffusionModel as DiffusionModel
from .modeling import LanguageModel as LanguageModel
from .modeling import NNsight as NNsight
from .modeling import TransformersModel as TransformersModel
from .modeling import VisionLanguageModel as VisionLanguageModel
from .modeling import set_opener as _set_opener
from .trace import Tracer as Tracer
from .trace import save as save

if TYPE_CHECKING:
    from .remote import compare as compare
    from .remote import is_model_running as is_model_running
    from .remote import register as register
    from .remote import status as status
    from .remote import whoami as whoami

__version__ = "0.1.0"

_REMOTE = frozenset({"compare", "is_model_running", "register", "status", "whoami"})


def __getattr__(name: str) -> Any:
    if name not in _REMOTE:
        raise AttributeError(f"module 'nnsight' has no attribute {name!r}")
    from . import remote

    return getattr(remote, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_REMOTE} - {"Any", "TYPE_CHECKING"})


def _open_remote(*args: Any) -> Any:
    from .remote import open_remote

    return open_remote(*args, embed=_embed)


def _embed(model: NNsight) -> Any:
    from .server import embed

    return embed(model)


_set_opener(_open_remote)
