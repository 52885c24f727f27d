"""What a client does before it sends, and after: names, values that cannot travel, jobs as handles."""

from __future__ import annotations

import asyncio
import sys
import types

import pytest
import torch

import nnsight
from nnsight import CONFIG, LanguageModel, NNsight
from nnsight.errors import InputError, NotSavedError, RemoteError, TravelError

HERE = {"backend": "local-process"}
X = torch.ones(1, 3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NNsight(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))


# --- names ----------------------------------------------------------------------------------------------------


def test_a_name_that_is_used_later_and_not_saved_is_found_before_sending(model):
    with pytest.raises(NotSavedError, match=r"'hidden' is bound .* \(line \d+ of test_client.py\) and used after it"):
        with model.trace(X, **HERE):
            hidden = model[0].output
        print(hidden)


def test_the_lines_of_both_places_are_named(model):
    with pytest.raises(NotSavedError) as caught:
        with model.trace(X, **HERE):
            hidden = model[0].output * 2
        hidden += 1
    with_line = caught.traceback[0].lineno + 1
    assert f"(line {with_line + 1} of" in str(caught.value)
    assert f"(line {with_line + 2})" in str(caught.value)


def test_names_that_are_bound_again_or_saved_some_way_are_no_error(model):
    with model.trace(X, **HERE):
        hidden = model[0].output
        kept = hidden.save()
        values = [hidden.save() for _ in range(2)]
        number = 3
        hidden.save()
    number = 4
    assert torch.equal(hidden, kept)
    assert torch.equal(values[1], kept)
    assert number == 4


def test_an_unsaved_name_says_so_when_it_is_used(model):
    with model.trace(X, **HERE):
        hidden = model[0].output
        model[1].output.save()

    def use():
        return hidden.shape

    with pytest.raises(NotSavedError, match=r"save\(\)"):
        use()
    for using in (
        lambda: hidden + 1,
        lambda: torch.sum(hidden),
        lambda: hidden[0],
        lambda: str(hidden),
        lambda: len(hidden),
    ):
        with pytest.raises(NotSavedError):
            using()
    assert "was not saved in the remote block" in repr(hidden)


def test_blocks_in_a_loop_bind_the_same_names(model):
    shapes = []
    for size in (1, 2):
        with model.trace(torch.ones(size, 3), **HERE):
            hidden = model[0].output
            shapes.append(hidden.shape)
    assert shapes == [(1, 4), (2, 4)]


def test_what_a_name_held_before_need_not_travel(model):
    hidden = sys.stdout
    with model.trace(X, **HERE):
        hidden = model[0].output.save()
    assert torch.equal(hidden, model._model[0](X))


def test_an_unsaved_value_in_a_list_from_outside_is_an_error(model):
    results = []
    with pytest.raises(TravelError, match=r"append\(value.save\(\)\)"):
        with model.trace(X, **HERE):
            results.append(model[0].output)
    assert results == []


def test_containers_from_outside_keep_their_identity(model):
    inner = [0]
    nested = {"inner": inner, "same": inner}
    with model.trace(X, **HERE):
        nested["inner"].append(model[0].output.save())
        nested["more"] = model[1].output.save()
    assert nested["inner"] is inner
    assert nested["same"] is inner
    assert inner[0] == 0
    assert torch.equal(inner[1], model._model[0](X))
    assert torch.equal(nested["more"], model._model(X))


def test_names_of_a_module_are_bound_there(model):
    code = "with model.trace(X, backend='local-process'):\n    hidden = model[0].output.save()\n"
    import linecache

    linecache.cache["<cell>"] = (len(code), None, code.splitlines(keepends=True), "<cell>")
    space = {"model": model, "X": X, "__name__": "cell"}
    exec(compile(code, "<cell>", "exec"), space)
    assert torch.equal(space["hidden"], model._model[0](X))


# --- what cannot travel -------------------------------------------------------------------------------------------


def test_a_value_that_cannot_travel_is_named_with_the_reason(model):
    settings = {"file": [sys.stdout]}
    with pytest.raises(TravelError, match=r"`settings\['file'\]\[0\]` cannot travel: it is a "):
        with model.trace(X, **HERE):
            print(settings)


def test_a_second_model_cannot_travel(model):
    other = NNsight(torch.nn.Linear(3, 3))
    with pytest.raises(TravelError, match="one served model"):
        with model.trace(X, **HERE):
            other.weight.save()


def test_functions_that_change_what_is_outside_them_are_refused(model):
    counter = 0

    def count():
        nonlocal counter
        counter += 1

    with pytest.raises(TravelError, match="assigns 'counter'"):
        with model.trace(X, **HERE):
            count()


def test_lambdas_travel(model):
    double = lambda values: values * 2  # noqa: E731
    with model.trace(X, **HERE):
        hidden = double(model[0].output).save()
    assert torch.equal(hidden, model._model[0](X) * 2)


def test_recursive_and_decorated_functions_travel(model):
    def twice(function):
        return lambda *args: function(*args) * 2

    @twice
    def identity(values):
        return values

    def power(values, n):
        return values if n == 0 else power(values, n - 1) * values

    with model.trace(X, **HERE):
        raised = power(model[0].output, 2).save()
    assert torch.equal(raised, model._model[0](X) ** 2 * model._model[0](X))


def test_a_module_of_ones_own_travels_when_it_is_registered(model, tmp_path, monkeypatch):
    (tmp_path / "own_helpers.py").write_text("import torch\n\ndef halve(values):\n    return values / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_helpers

    with pytest.raises(TravelError, match=r"nnsight.register\(own_helpers\)"):
        with model.trace(X, **HERE):
            hidden = own_helpers.halve(model[0].output).save()
    nnsight.register(own_helpers)
    with model.trace(X, **HERE):
        hidden = own_helpers.halve(model[0].output).save()
    assert torch.equal(hidden, model._model[0](X) / 2)
    with pytest.raises(TravelError, match="no source file"):
        nnsight.register(types.ModuleType("nothing"))


# --- settings -----------------------------------------------------------------------------------------------------


def test_without_a_server_the_error_says_how_to_name_one(monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", None)
    with pytest.raises(RemoteError, match=r"CONFIG.API.HOST = .*"):
        LanguageModel("openai-community/gpt2").trace("Hello", remote=True)


def test_a_model_of_ones_own_has_no_name_on_a_server(model, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="local-process"):
        model.trace(X, remote=True)


def test_an_unknown_backend_is_refused(model):
    with pytest.raises(InputError, match="local-process"):
        model.trace(X, backend="elsewhere")


def test_remote_false_is_here(model):
    with model.trace(X, remote=False):
        hidden = model[0].output
    assert torch.equal(hidden, model._model[0](X))


# --- jobs ---------------------------------------------------------------------------------------------------------


def test_a_job_that_nobody_waits_for(model):
    with model.trace(X, blocking=False, **HERE) as job:
        hidden = model[0].output.save()
        other = model[1].output
    values = job.result()
    assert values.keys() == {"hidden"}
    assert torch.equal(values["hidden"], model._model[0](X))
    assert job.status == "done"
    assert job.result() is not None


def test_a_job_is_awaited(model):
    with model.trace(X, blocking=False, **HERE) as job:
        hidden = model[0].output.save()

    async def wait():
        return await job

    assert torch.equal(asyncio.run(wait())["hidden"], model._model[0](X))


def test_the_error_of_a_job_comes_with_its_result(model):
    with model.trace(X, blocking=False, **HERE) as job:
        raise ValueError("of the block")
    with pytest.raises(ValueError, match="of the block"):
        job.result()


def test_other_names_of_modules_are_known_there():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model = NNsight(net, rename={"0": "first"})
    with model.trace(X, **HERE):
        hidden = model.first.output.save()
    assert torch.equal(hidden, net[0](X))


def test_a_module_given_by_name_is_the_same_there(model):
    layer = model[0]
    with model.trace(X, **HERE):
        hidden = layer.output.save()
    assert torch.equal(hidden, model._model[0](X))
