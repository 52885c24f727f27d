"""Models: how each kind is loaded, fed and shown."""

from ._apply import edit_of as edit_of
from ._base import NNsight as NNsight
from ._diffusion import DiffusionModel as DiffusionModel
from ._elsewhere import Elsewhere as Elsewhere
from ._elsewhere import open_elsewhere as open_elsewhere
from ._elsewhere import set_opener as set_opener
from ._hidden import show_block_output as show_block_output
from ._hidden import take_block_output as take_block_output
from ._language import LanguageModel as LanguageModel
from ._portable import is_model_output as is_model_output
from ._portable import put_together as put_together
from ._portable import take_apart as take_apart
from ._transformers import TransformersModel as TransformersModel
from ._vision import VisionLanguageModel as VisionLanguageModel
