"""The tree of module proxies."""

from ._classes import Classes as Classes
from ._envoy import Envoy as Envoy
from ._rename import Aliases as Aliases
from ._tree import Tree as Tree
from ._tree import first_input as first_input
from ._tree import present_plainly as present_plainly
from ._view import View as View
