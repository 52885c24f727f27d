"""`.save()` and `.value` on what a trace hands out, and on nothing else."""

import enum
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import Linear, ReLU, Sequential

import nnsight
from nnsight import NNsight
from nnsight.errors import SavedValueChangedWarning

SRC = Path(__file__).parents[2] / "src"
VALUES = [
    [1, 2],
    {"a": 1},
    (1, 2),
    {1, 2},
    frozenset({1}),
    3,
    2.5,
    1j,
    "text",
    b"bytes",
    True,
    torch.Size([2, 3]),
    torch.zeros(2),
    torch.nn.Parameter(torch.zeros(2)),
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NNsight(Sequential(Linear(3, 3), ReLU(), Linear(3, 3)))


@pytest.fixture
def x():
    return torch.ones(2, 3)


@pytest.mark.usefixtures("model")
class TestMounted:
    @pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
    def test_on_built_in_values(self, value):
        assert value.save() is value
        assert value.value is value
        assert nnsight.save(value) is value

    def test_on_anything_by_function(self):
        thing = object()
        assert nnsight.save(thing) is thing
        assert nnsight.save(None) is None

    def test_not_on_object(self):
        class Own:
            pass

        for value in (Own(), Own, None, len):
            assert not hasattr(value, "save")
            assert not hasattr(value, "value")

    def test_torch_finds_every_name_of_its_tensors(self):
        for kind in (torch.Tensor, torch.nn.Parameter):
            assert [name for name in dir(kind) if not hasattr(kind, name) and name in ("save", "value")] == []

    def test_torch_compile(self, model, x):
        compiled = torch.compile(model._model, backend="eager")
        assert torch.equal(compiled(x), model._model(x))

    def test_enum_with_a_built_in_base(self):
        class Colour(str, enum.Enum):
            RED = "red"

        class Number(enum.IntEnum):
            ONE = 1

        class Tagged(tuple, enum.Enum):
            PAIR = (1, 2)

        assert Colour.RED.value == "red"
        assert type(Colour.RED.value) is str
        assert Colour("red") is Colour.RED
        assert Number.ONE.value == 1
        assert Number(1) is Number.ONE
        assert Tagged.PAIR.value == (1, 2)
        assert type(Tagged.PAIR.value) is tuple

    def test_enums_of_libraries(self):
        import http
        import signal

        assert http.HTTPStatus.OK.value == 200
        assert type(signal.SIGINT.value) is int

    def test_subclass_with_its_own(self):
        class Settings(dict):
            def save(self, path):
                return path

            value = "own"

        assert Settings().save("here") == "here"
        assert Settings().value == "own"

        class Stored:
            def save(self):
                return "stored"

        class Both(Stored, dict):
            pass

        class Behind(dict, Stored):
            pass

        assert Both().save() == "stored"
        assert Behind().save() == "stored"

    def test_mapping_with_attribute_access(self):
        class Attributes(dict):
            def __getattr__(self, name):
                try:
                    return self[name]
                except KeyError:
                    raise AttributeError(name) from None

            __setattr__ = dict.__setitem__

        settings = Attributes(value=5)
        settings.save = "yes"
        assert settings.value == 5
        assert settings.save == "yes"
        assert settings == {"value": 5, "save": "yes"}
        assert not hasattr(Attributes(), "value")

    def test_attribute_of_an_instance(self):
        class Held(dict):
            pass

        held = Held()
        held.value = 5
        held.save = 6
        assert (held.value, held.save) == (5, 6)

    def test_named_tuple_fields(self):
        from collections import namedtuple

        entry = namedtuple("Entry", "value save")(1, 2)
        assert (entry.value, entry.save) == (1, 2)

    def test_tensor_subclass_with_its_own(self):
        class Own(torch.Tensor):
            @property
            def value(self):
                return "own"

        assert torch.zeros(2).as_subclass(Own).value == "own"


class TestUnmount:
    def test_in_a_program(self):
        program = """
import torch, nnsight
kinds = [torch.zeros(1), [], {}, (), set(), frozenset(), 1, 1.0, 1j, "", b"", torch.Size([1])]
before = [dir(value) for value in kinds]
assert not any(hasattr(value, name) for value in kinds for name in ("save", "value"))
for _ in range(2):
    model = nnsight.NNsight(torch.nn.Linear(1, 1))
    assert all(value.save() is value and value.value is value for value in kinds)
    nnsight.unmount()
    assert [dir(value) for value in kinds] == before
    assert not any(hasattr(value, name) for value in kinds for name in ("save", "value"))
    nnsight.unmount()
with model.trace(torch.ones(1, 1)):
    kept = nnsight.save(model.output)
assert kept.shape == (1, 1)
print("done")
"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(SRC)},
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def saves(model, x, body):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad(), model.trace(x):
            kept = body()
    return kept, [w for w in caught if w.category is SavedValueChangedWarning]


class TestSavedValueChanged:
    def test_edit_after_the_save(self, model, x):
        line = sys._getframe().f_lineno + 3

        def body():
            kept = model[0].output.save()
            model[0].output[:] = 0
            return kept

        kept, caught = saves(model, x, body)
        assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
        assert not kept.any()

    def test_change_by_the_model(self, x):
        model = NNsight(Sequential(Linear(3, 3), ReLU(inplace=True)))

        kept, caught = saves(model, x, lambda: model[0].output.save())
        assert len(caught) == 1
        assert (kept >= 0).all()

    def test_copy(self, model, x):
        def body():
            kept = model[0].output.clone().save()
            model[0].output[:] = 0
            return kept

        kept, caught = saves(model, x, body)
        assert caught == []
        assert kept.any()

    def test_edit_before_the_save(self, model, x):
        def body():
            model[0].output[:] = 1
            return model[0].output.save()

        _, caught = saves(model, x, body)
        assert caught == []

    def test_replacement_after_the_save(self, model, x):
        def body():
            kept = model[0].output.save()
            model[0].output = kept * 0
            return kept

        kept, caught = saves(model, x, body)
        assert caught == []
        assert kept.any()

    def test_tensor_in_a_container(self, model, x):
        def body():
            kept = {"hidden": [model[0].output]}.save()
            model[0].output[:] = 0
            return kept

        _, caught = saves(model, x, body)
        assert len(caught) == 1

    def test_change_after_the_trace(self, model, x):
        kept, caught = saves(model, x, lambda: model[0].output.save())
        kept[:] = 0
        assert caught == []

    def test_outside_a_trace(self, model):
        value = torch.ones(2)
        assert value.save() is value
