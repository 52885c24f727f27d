"""Dictionaries spliced into a model: on a server in this process, and confined on a server, as they are here."""

from __future__ import annotations

import argparse
import dataclasses
from typing import ClassVar

import pytest
import torch

from nnsight.experiments import splice
from nnsight.remote._job import JobWriter, Order

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "The Colosseum is in the city of"
WIDTH = 128


def weights(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


class Coder(torch.nn.Module):
    def __init__(self, features=48, seed=0):
        super().__init__()
        self.up = torch.nn.Parameter(weights(WIDTH, features, seed=seed))
        self.down = torch.nn.Parameter(weights(features, WIDTH, seed=seed + 1))
        self.register_buffer("mean", weights(WIDTH, seed=seed + 2))

    def encode(self, value):
        return ((value - self.mean) @ self.up).relu()

    def decode(self, features):
        return features @ self.down + self.mean


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int
    features: int = 24
    slope: ClassVar[float] = 0.5

    def layers(self):
        return torch.nn.Linear(self.width, self.features), torch.nn.Linear(self.features, self.width)


class Nested(torch.nn.Module):
    """Modules in modules, a tied weight, a setting of its own class and one of a library's, and dropout that is off."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.shape = Shape(WIDTH)
            into, out = self.shape.layers()
            self.encoder = torch.nn.Sequential(into, torch.nn.LeakyReLU(self.shape.slope), torch.nn.Dropout(0.5))
        self.heads = torch.nn.ModuleDict({"out": out, "same": out})
        self.tied = torch.nn.Linear(WIDTH, self.shape.features, bias=False)
        self.tied.weight = into.weight
        self.settings = argparse.Namespace(scale=1.5)
        self.eval()

    def encode(self, value):
        assert self.tied.weight is self.encoder[0].weight
        assert self.heads["out"] is self.heads["same"]
        assert type(self.shape).__name__ == "Shape"
        return self.encoder(value) * self.settings.scale * Shape(WIDTH).slope + self.tied(value)

    def decode(self, features):
        return self.heads["out"](features)


class Plain:
    """Anything with encode and decode will do."""

    def __init__(self):
        self.basis = torch.linalg.qr(weights(WIDTH, 64, seed=5)).Q

    def encode(self, value):
        return value @ self.basis

    def decode(self, features):
        return features @ self.basis.T


CODERS = {"parameters": Coder, "nested": Nested, "plain": Plain}
MASK = (torch.arange(48) % 2).float()


def half(features):
    return features * every_other(features.shape[-1])


def every_other(count):
    return torch.arange(count) % 2


@pytest.fixture(autouse=True)
def nothing_is_loaded(model, where):
    yield
    if where:
        assert not model.dispatched


def run(spliced, prompt=PROMPT, **where):
    """The logits of a run, and the features that it left."""
    with spliced.model.trace(prompt, **where):
        logits = spliced.model.logits.save()
    return logits, spliced.features


def same(found, expected):
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def plain_logits(gpt2):
    with gpt2.trace(PROMPT):
        return gpt2.logits.save()


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("change", [None, half])
def test_a_dictionary(model, where, gpt2, kind, error, change):
    coder = CODERS[kind]()
    found = run(splice(model, coder, 3, error=error, change=change), **where)
    expected = run(splice(gpt2, coder, 3, error=error, change=change))
    same(found, expected)
    assert torch.allclose(found[0], plain_logits(gpt2), atol=1e-3) == (error and change is None)


def test_as_it_is_written_in_the_documents(model, where, gpt2):
    with splice(model, Coder(), layer=6) as spliced:
        with spliced.model.trace(PROMPT, **where):
            logits = spliced.model.logits.save()
        features = spliced.features
    assert spliced.features is None
    with gpt2.trace(PROMPT):
        value = gpt2.resid_post[6].save()
    assert torch.equal(features, Coder().encode(value))
    assert torch.allclose(logits, plain_logits(gpt2), atol=1e-3)


@pytest.mark.parametrize("error", [True, False])
def test_a_transcoder(model, where, gpt2, error):
    def transcoder(of):
        return splice(of, Coder(seed=7), -3, "mlp_out", source="resid_mid", error=error, change=half)

    same(run(transcoder(model), **where), run(transcoder(gpt2)))


def test_a_change_that_is_a_lambda(model, where, gpt2):
    """Where it is usually written: in the call, among others, over lines, with a variable of the place."""
    coder, scale = Coder(), 3.0
    with splice(model, coder, 3, change=lambda features: features * scale) as spliced:
        found = run(spliced, **where)
    same(found, run(splice(gpt2, coder, 3, change=lambda features: features * scale)))
    first, second = (splice(model, coder, 3, change=c) for c in (lambda f: f * MASK, lambda f: f * (1 - MASK)))
    same(run(first, **where), run(splice(gpt2, coder, 3, change=lambda f: f * MASK)))
    same(run(second, **where), run(splice(gpt2, coder, 3, change=lambda f: f * (1 - MASK))))
    changes = {
        "zero": lambda features: (
            features
            * 0
        ),
        "made": (lambda by: lambda by_: by_ * by)(2),
        "same": (lambda x: lambda x: x)(2),
    }  # fmt: skip
    for name, factor in (("zero", 0), ("made", 2), ("same", 1)):
        found = run(splice(model, coder, 3, change=changes[name]), **where)
        same(found, run(splice(gpt2, coder, 3, change=lambda f: f * factor)))  # noqa: B023


def test_gradients_reach_the_dictionary(model, where, gpt2):
    def gradients(model, **where):
        coder = Coder()
        with splice(model, coder, 3, error=False) as spliced:
            with spliced.model.trace(PROMPT, **where):
                spliced.model.logits[0, -1].logsumexp(-1).backward()
        gpt2._model.zero_grad(set_to_none=True)
        return [parameter.grad for parameter in coder.parameters()]

    for found, expected in zip(gradients(model, **where), gradients(gpt2), strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(found, expected)


def test_features_are_there_inside_the_block(model, where, gpt2):
    spliced = splice(model, Coder(), 3)
    with spliced.model.trace(PROMPT, **where):
        spliced.model.resid_post[4]
        norm = spliced.features.norm().save()
    assert torch.equal(norm, run(splice(gpt2, Coder(), 3))[1].norm())


def test_features_are_those_of_the_last_run(model, where, gpt2):
    spliced, plain = splice(model, Coder(), 3), splice(gpt2, Coder(), 3)
    for prompt in (PROMPT, OTHER, [PROMPT, OTHER]):
        same(run(spliced, prompt, **where), run(plain, prompt))


def test_features_do_not_travel_there(gpt2):
    def tensors(spliced):
        writer = JobWriter(Order(spliced.model, "m", None, "trace", (), {}, False, 1.0, False))
        writer._model(spliced.model)
        return len(writer._encoder.tensors.infos)

    spliced = splice(gpt2, Coder(), 3)
    before = tensors(spliced)
    run(spliced)
    assert spliced.features is not None
    assert tensors(spliced) == before == 3


def test_generations_sessions_and_invokes(model, where, gpt2):
    def generated(model, **where):
        spliced = splice(model, Coder(), 3, change=half)
        with spliced.model.generate(PROMPT, max_new_tokens=3, **where) as tracer:
            ids = tracer.result.save()
        return ids, spliced.features

    def invoked(model, **where):
        spliced = splice(model, Coder(), 3, change=half)
        with spliced.model.trace(**where) as tracer:
            with tracer.invoke(PROMPT):
                first = spliced.model.logits.save()
            with tracer.invoke(OTHER):
                second = spliced.model.logits.save()
        return first, second, spliced.features

    def in_a_session(model, **where):
        coder = Coder()
        with model.session(**where):
            with splice(model, coder, 3, change=half) as spliced:
                with spliced.model.trace(PROMPT):
                    logits = spliced.model.logits.save()
                features = spliced.features.save()
        return logits, features

    for way in (generated, invoked, in_a_session):
        same(way(model, **where), way(gpt2))


def test_a_job_that_nobody_waits_for_leaves_its_features(model, where, gpt2):
    if not where:
        pytest.skip("a trace here is always waited for")
    spliced = splice(model, Coder(), 3)
    with spliced.model.trace(PROMPT, blocking=False, **where) as job:
        logits = spliced.model.logits.save()
    found = job.result()["logits"]
    same((found, spliced.features), run(splice(gpt2, Coder(), 3)))


def test_an_edit_of_the_users_that_holds_a_dictionary(model, where, gpt2):
    def edited(model, **where):
        coder = Nested()
        with model.edit() as changed:
            features = coder.encode(model.resid_post[3])
            model.resid_post[3] = coder.decode(half(features))
        with changed.trace(PROMPT, **where):
            logits = changed.logits.save()
        return logits

    assert torch.equal(edited(model, **where), edited(gpt2))


def test_an_error_of_the_dictionary_is_at_its_line(model, where):
    class Wrong(Coder):
        def decode(self, features):
            return features[..., : len("abc")]

    from nnsight.errors import InputError

    with pytest.raises(InputError, match=r"gives \[1, \d+, 3\] where the model has \[1, \d+, 128\]"):
        run(splice(model, Wrong(), 3), **where)
