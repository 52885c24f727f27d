"""Models for every misuse, which must be as they were afterwards, and work."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from nnsight import LanguageModel, NNsight
from nnsight._core import active

Refused = Callable[[type[BaseException], str], AbstractContextManager[None]]
IDS = [[1, 2, 3]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.unused = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def model(net: nn.Module) -> NNsight:
    return NNsight(net)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4)


@pytest.fixture(scope="session")
def language_module() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=19,
        n_positions=32,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def lm(language_module: nn.Module) -> LanguageModel:
    return LanguageModel(language_module)


@pytest.fixture
def refused() -> Refused:
    """A block that must end with an error of exactly this class, whose message has this in it."""

    @contextmanager
    def check(kind: type[BaseException], text: str) -> Iterator[None]:
        with pytest.raises(kind) as caught:
            yield
        assert caught.type is kind
        assert re.search(text, " ".join(str(caught.value).split())), str(caught.value)

    return check


def state(module: nn.Module) -> list[dict[str, Any]]:
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(inner).items()}
        for inner in module.modules()
    ]


@pytest.fixture(autouse=True)
def _unharmed(net: nn.Module, language_module: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Afterwards nothing runs or is open, the modules are as before, and both models can be traced."""
    modules = net, language_module
    before = [state(module) for module in modules]
    threads = {*threading.enumerate()}
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not {thread for thread in threading.enumerate() if "nnsight" in thread.name} - threads
    assert [state(module) for module in modules] == before
    again = NNsight(net)
    with again.trace(x):
        hidden, output = again.first.output, again.output
    assert torch.equal(hidden, net.first(x))
    assert torch.equal(output, net(x))
    with LanguageModel(language_module).generate(IDS, max_new_tokens=2) as tracer:
        result = tracer.result
    assert active.get() is None
    assert torch.equal(result, language_module.generate(torch.tensor(IDS), max_new_tokens=2, pad_token_id=0))
