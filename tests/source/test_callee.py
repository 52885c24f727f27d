"""What an operation calls, told without running the function."""

import functools

import pytest
import torch
from torch import nn

from nnsight.errors import SourceError
from nnsight.source import callee_of

TABLE = {"tanh": torch.tanh}


def helper(x):
    return x


def make():
    def enclosed(x):
        return x

    def function(x):
        return enclosed(x)

    return function, enclosed


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.key = "tanh"

    def helper(self, x):
        return x

    def forward(self, x, given=helper):
        helper(x)
        self.helper(x)
        self.lin(x)
        torch.tanh(x)
        len(x)
        found = TABLE.get(self.key, helper)
        found(x)
        item: object = TABLE["tanh"]
        item(x)
        made = functools.partial(helper)
        made(x)
        given(x)
        x.sum()
        either = helper
        if x is None:
            either = len
        either(x)
        self.absent(x)
        TABLE["absent"](x)


def test_what_can_be_told():
    net = Net()
    called = {
        name: callee_of(net.forward, name)
        for name in (
            *("helper_0", "self_helper_0", "self_lin_0"),
            *("torch_tanh_0", "len_0", "found_0", "item_0"),
        )
    }
    assert called == {
        "helper_0": helper,
        "self_helper_0": net.helper,
        "self_lin_0": net.lin,
        "torch_tanh_0": torch.tanh,
        "len_0": len,
        "found_0": torch.tanh,
        "item_0": torch.tanh,
    }


@pytest.mark.parametrize("name", ["made_0", "given_0", "x_sum_0", "either_0", "self_absent_0", "TABLE_0"])
def test_what_only_a_run_can_tell(name):
    assert callee_of(Net().forward, name) is None


def test_closure():
    function, enclosed = make()
    assert callee_of(function, "enclosed_0") is enclosed


def test_unknown_operation():
    with pytest.raises(SourceError, match="no operation absent_0"):
        callee_of(helper, "absent_0")
