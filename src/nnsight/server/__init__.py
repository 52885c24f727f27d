"""A server that holds models and runs other people's blocks on them."""

from ._embed import embed as embed
