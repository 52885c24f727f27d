"""vLLM: blocks inside a serving engine, on the tokens of their own request."""

from ._host import Host as Host
from ._model import VLLM as VLLM
