"""A server that holds models and runs other people's blocks on them."""

from ._budget import Budget as Budget
from ._embed import embed as embed
from ._keys import create_key as create_key
from ._keys import list_users as list_users
from ._keys import revoke_keys as revoke_keys
from ._limits import Limits as Limits
from ._serve import serve as serve
