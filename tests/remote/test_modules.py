"""Modules and classes of the user's in blocks: what travels is what is here, and what cannot is refused by name."""

from __future__ import annotations

import enum
import importlib
import sys
import warnings
from abc import ABC, abstractmethod

import pytest
import torch
from torch import nn

import nnsight
from nnsight import NNsight
from nnsight.errors import TravelError

PROMPT = "The Eiffel Tower is in the city of"
HERE = {"backend": "local-process"}
WIDTH = 128


def applied(model, probe, where):
    """What a probe makes of the stream."""
    with torch.no_grad(), model.trace(PROMPT, **where):
        found = nnsight.save(probe(model.resid_post[2]))
    return found


class Encoder(nn.Module):
    """What `nn.TransformerEncoderLayer` and the others need is theirs; the order of the axes is ours."""

    def __init__(self, make):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner = make()

    def forward(self, value):
        found = self.inner(value)
        return found[0] if isinstance(found, tuple) else found


class Attends(Encoder):
    def forward(self, value):
        return self.inner(value, value, value)[0]


KINDS = {
    "linear": lambda: Encoder(lambda: nn.Linear(WIDTH, 3)),
    "sequential": lambda: Encoder(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3), nn.GELU())),
    "lstm": lambda: Encoder(lambda: nn.LSTM(WIDTH, 5, num_layers=2, bidirectional=True, batch_first=True)),
    "attention": lambda: Attends(lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True)),
    "transformer": lambda: Encoder(lambda: nn.TransformerEncoderLayer(WIDTH, 4, 32, 0.0, batch_first=True)),
    "frozen": lambda: Encoder(lambda: nn.Linear(WIDTH, 3)).requires_grad_(False),
    "float64": lambda: Encoder(lambda: nn.Sequential(Cast(), nn.Linear(WIDTH, 3, dtype=torch.float64))),
    "dropout that is off": lambda: Encoder(lambda: nn.Sequential(nn.Dropout(0.9), nn.Linear(WIDTH, 3))).eval(),
}


class Cast(nn.Module):
    def forward(self, value):
        return value.double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_computes_the_same(model, where, gpt2, kind):
    found = applied(model, KINDS[kind](), where)
    assert torch.equal(found, applied(gpt2, KINDS[kind](), {}))
    assert found.norm() > 0


def test_dropout_that_is_on_is_on_there(model, where):
    probe = nn.Dropout(0.5)
    zeros = (applied(model, probe, where) == 0).float().mean()
    assert 0.4 < zeros < 0.6


def test_buffers_that_a_forward_changes_come_back(model, where, gpt2):
    def trained(model, where):
        norm = nn.BatchNorm1d(WIDTH)
        with torch.no_grad(), model.trace(PROMPT, **where):
            norm(model.resid_post[2][0])
        return norm

    found, expected = trained(model, where), trained(gpt2, {})
    assert found.num_batches_tracked == 1
    assert torch.equal(found.running_mean, expected.running_mean)
    assert torch.equal(found.running_var, expected.running_var)
    assert expected.running_mean.norm() > 0


def test_a_change_that_pytorch_does_not_count_comes_back(model, where):
    probe = nn.Linear(WIDTH, 3)
    vector = torch.zeros(300_000)
    before = probe.weight.detach().clone()
    with model.trace(PROMPT, **where):
        probe.weight.data.mul_(3)
        probe.bias.detach().numpy()[1] = 7
        vector.data[-1] = 1
        model.logits.save()
    assert torch.equal(probe.weight.detach(), before * 3)
    assert probe.bias[1] == 7
    assert vector.sum() == vector[-1] == 1


@pytest.mark.parametrize("inner", [lambda: nn.Linear(WIDTH, 3), lambda: nn.LSTM(WIDTH, 3)])
def test_a_mode_that_a_block_changes_comes_back(model, where, inner):
    probe = nn.Sequential(inner(), nn.Dropout(0.0))
    probe[0].register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    with model.trace(PROMPT, **where):
        probe.eval()
        first = nnsight.save(probe[0](model.resid_post[2]))
    assert not probe.training
    assert not probe[1].training
    assert all(isinstance(parameter, nn.Parameter) for parameter in probe.parameters())
    assert torch.equal(applied(model, probe[0], where)[0], first[0])
    probe[0].load_state_dict({})  # the hook on it is still there


def test_shared_parameters_stay_shared(model, where):
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    probe = nn.ModuleList([first, second, first])
    with model.trace(PROMPT, **where):
        shared = [probe[0].weight is probe[1].weight, probe[2] is probe[0], len(list(probe.parameters()))].save()
        probe[1](model.resid_post[2]).sum().backward()
        with torch.no_grad():
            first.weight += 1
        equal = torch.equal(first.weight, second.weight).save()
    assert shared == [True, True, 3]
    assert equal
    assert first.weight.grad is not None
    assert first.weight is second.weight


class Base(ABC):
    """Refers to its heir, which is made from it."""

    factor = 2.0

    @abstractmethod
    def of(self, value): ...

    def heir(self):
        return Heir(self.factor)


class Heir(Base):
    def __init__(self, factor=Base.factor):
        self.factor = factor

    def of(self, value):
        return value * self.factor * super().factor


class Grown(Heir):
    def __init__(self):
        super().__init__(5.0)


@pytest.mark.parametrize("cls", [Heir, Grown])
def test_classes_that_name_each_other(model, where, gpt2, cls):
    thing = cls()

    def block(model, where):
        with model.trace(PROMPT, **where):
            value = thing.heir().of(thing.of(model.resid_post[1])).save()
            kind = isinstance(thing, Base).save()
        assert kind
        return value

    assert torch.equal(block(model, where), block(gpt2, {}))


# --- what cannot travel ---------------------------------------------------------------------------------------


def hooked():
    probe = nn.Linear(3, 3)
    probe.register_forward_hook(lambda module, args, output: output * 2)
    return nn.Sequential(probe)


def hooked_before():
    probe = nn.Linear(3, 3)
    probe.register_forward_pre_hook(lambda module, args: None)
    return probe


def hooked_weight():
    probe = nn.Linear(3, 3)
    probe.weight.register_hook(lambda gradient: gradient * 2)
    return probe


def hooked_after_its_gradient():
    probe = nn.Linear(3, 3)
    probe.bias.register_post_accumulate_grad_hook(lambda weight: None)
    return probe


def compiled_in_place():
    probe = nn.Linear(3, 3)
    probe.compile(backend="eager")
    return probe


def pruned():
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Linear(3, 3), "weight", 1)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(3, 3))


def overlapping():
    probe = nn.ModuleDict({"up": nn.Linear(3, 4, bias=False), "down": nn.Linear(4, 3, bias=False)})
    probe["down"].weight.data = probe["up"].weight.data.T
    return probe


class Quantized(nn.Parameter):
    pass


def of_another_kind():
    probe = nn.Linear(3, 3)
    probe.weight = Quantized(probe.weight.detach())
    return probe


class Colour(enum.Enum):
    RED = 1


REFUSED = {
    "hook": (hooked, r"`probe._modules\['0'\]` cannot travel: there are hooks on this Linear"),
    "hook before": (hooked_before, r"hooks on this Linear.*handle.remove\(\)"),
    "hook of a weight": (hooked_weight, "hooks on its weight"),
    "hook after a gradient": (hooked_after_its_gradient, "hooks on its bias"),
    "pruned": (pruned, "undoes weight_norm and prune"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        "its weight is computed by a parametrization.*remove_parametrizations",
    ),
    "compiled": (lambda: torch.compile(nn.Linear(3, 3), backend="eager"), "it was compiled. Send the module"),
    "compiled in place": (compiled_in_place, "it was compiled. Send the module"),
    "scripted": (scripted, "ScriptModule"),
    "lazy": (lambda: nn.LazyLinear(3), "its weight has no numbers before its first call"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), "on the meta device"),
    "overlapping": (overlapping, r"weight of .*up.* are two tensors with the same numbers.*self.a.T.*clone\(\)"),
    "another kind": (of_another_kind, "its weight is a Quantized"),
    "enumeration": (lambda: Colour.RED, "it is a .*Colour"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_another_thing_there_is_refused(kind):
    make, message = REFUSED[kind]
    probe, net = make(), NNsight(nn.Linear(3, 3))
    with pytest.raises(TravelError, match=message):
        with net.trace(torch.ones(1, 3), **HERE):
            found = probe(net.output).save()


def test_the_remedies_help():
    net, x = NNsight(nn.Linear(3, 3)), torch.ones(1, 3)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    plain = nn.Linear(3, 3)
    plain.weight.data, plain.bias = normed.weight.detach(), normed.bias
    bare = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    nn.utils.parametrize.remove_parametrizations(bare, "weight")
    tied = overlapping()
    tied["down"].weight.data = tied["down"].weight.data.clone()
    with torch.no_grad(), net.trace(x, **HERE):
        first = plain(net.output).save()
        second = tied["down"](tied["up"](net.output)).save()
        third = bare(net.output).save()
    with torch.no_grad():
        assert torch.equal(first, normed(net._model(x)))
        assert torch.equal(third, bare(net._model(x)))
        assert torch.equal(second, tied["down"](tied["up"](net._model(x))))


OWN = """
import torch

class Probe(torch.nn.Module):
    scale = 2.0
    names = ("a", "b")

    def forward(self, value):
        def inner(x: "anything" = None) -> "anything":
            return value * self.scale
        return inner()

    @property
    def twice(self):
        return self.scale * 2

class Other:
    def forward(self, value):
        return value
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's that pytest does not rewrite."""
    (tmp_path / "own_probe.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_probe")
    del sys.modules["own_probe"]


def test_a_class_is_what_its_source_says(own):
    net = NNsight(nn.Linear(3, 3))

    def use():
        probe = own.Probe()
        with torch.no_grad(), net.trace(torch.ones(1, 3), **HERE):
            found = probe(net.output).save()
        return found

    with torch.no_grad():
        assert torch.equal(use(), net._model(torch.ones(1, 3)) * 2)
    for name, value in (("scale", 3.0), ("names", ("a",)), ("forward", own.Other.forward), ("more", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(own.Probe, name, value, raising=False)
            with pytest.raises(TravelError, match=f"'Probe' cannot travel: its '{name}' is not the one in its source"):
                use()
    probe = own.Probe()
    probe.scale = 3.0  # the remedy
    with torch.no_grad(), net.trace(torch.ones(1, 3), **HERE):
        found = probe(net.output).save()
    with torch.no_grad():
        assert torch.equal(found, net._model(torch.ones(1, 3)) * 3)


def test_a_class_of_a_notebook_travels():
    """Its module has no file; its methods know the cell."""
    import linecache

    cell = "import torch\nclass Probe(torch.nn.Module):\n    def forward(self, value):\n        return value * 2\n"
    linecache.cache["<cell 1>"] = (len(cell), None, cell.splitlines(keepends=True), "<cell 1>")
    space = {"__name__": "of_no_file"}
    exec(compile(cell, "<cell 1>", "exec"), space)
    probe, net = space["Probe"](), NNsight(nn.Linear(3, 3))
    with torch.no_grad(), net.trace(torch.ones(1, 3), **HERE):
        found = probe(net.output).save()
    with torch.no_grad():
        assert torch.equal(found, net._model(torch.ones(1, 3)) * 2)


def test_a_lambda_that_cannot_be_told_is_refused():
    net = NNsight(nn.Linear(3, 3))
    double = eval("lambda value: value * 2")
    with pytest.raises(TravelError, match=r"not found in its file.*Define it with `def`"):
        with net.trace(torch.ones(1, 3), **HERE):
            found = double(net.output).save()
