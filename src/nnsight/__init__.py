"""nnsight: read and change what happens inside any PyTorch model while it runs."""

from ._patches import unmount as unmount
from .config import CONFIG as CONFIG
from .envoy import Envoy as Envoy
from .envoy import View as View
from .modeling import LanguageModel as LanguageModel
from .modeling import NNsight as NNsight
from .modeling import TransformersModel as TransformersModel
from .modeling import VisionLanguageModel as VisionLanguageModel
from .trace import Tracer as Tracer
from .trace import save as save

__version__ = "0.1.0"
