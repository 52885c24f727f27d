"""A server that holds models and runs other people's blocks on them."""

from ._embed import embed as embed
from ._keys import create_key as create_key
from ._serve import serve as serve
