"""The vocabulary: one set of names for the layers, stream, heads and neurons of every architecture."""

from ._family import Attention as Attention
from ._family import Family as Family
from ._named import Name as Name
from ._named import Named as Named
from ._named import find_named as find_named
from ._registry import family as family
from ._registry import register as register
from ._site import Site as Site
from ._vocabulary import Vocabulary as Vocabulary
from ._window import INTERFACE as INTERFACE
from ._window import calls_interface as calls_interface
from ._window import open_window as open_window
