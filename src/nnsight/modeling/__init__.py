"""Models: how each kind is loaded, fed and shown."""

from ._base import NNsight as NNsight
from ._language import LanguageModel as LanguageModel
from ._transformers import TransformersModel as TransformersModel
from ._vision import VisionLanguageModel as VisionLanguageModel
