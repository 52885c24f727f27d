"""The tree of module proxies."""

from ._envoy import Envoy as Envoy
from ._tree import Tree as Tree
from ._tree import present_plainly as present_plainly
