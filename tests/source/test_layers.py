"""Decorators, bound methods and partials around a function, taken off and put on again."""

import functools

import pytest
import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module

from nnsight.errors import SourceError
from nnsight.source import analyse, instrument


def plain(name, f, args, kwargs):
    return f(*args, **kwargs)


def counted(function):
    """A decorator that counts how often it is applied and how often its wrapper runs."""
    counted.applied += 1

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        counted.ran += 1
        return function(*args, **kwargs)

    return wrapper


counted.applied = counted.ran = 0


@counted
@torch.no_grad()
@counted
def decorated(x):
    return x.abs().sum()


def test_wrappers_run_and_decorators_do_not(recorder):
    applied, ran = counted.applied, counted.ran
    record = recorder()
    x = torch.ones(3, requires_grad=True)
    result = instrument(decorated, record)(x)
    assert record.names == ["x_abs_0", "x_abs_sum_0"]
    assert (counted.applied, counted.ran) == (applied, ran + 2)
    assert result == 3
    assert not result.requires_grad


def test_the_original_wrappers_are_left_alone():
    cells = [cell.cell_contents for cell in decorated.__closure__]
    instrument(decorated, lambda *call: 0)
    assert [cell.cell_contents for cell in decorated.__closure__] == cells
    assert decorated(torch.ones(2)) == 2


def test_without_unwrapping_the_wrapper_has_the_operations(recorder):
    assert list(analyse(decorated, unwrap=False).operations) == ["function_0"]
    record = recorder()
    assert instrument(decorated, record, unwrap=False)(torch.ones(2)) == 2
    assert record.names == ["function_0"]


def test_a_wrapper_that_knows_itself_keeps_its_identity(gpt2_small):
    # `forward_with_checkpointing` compares `type(self).forward` with itself.
    forward = type(gpt2_small.transformer.h[0]).forward
    (own,) = [cell.cell_contents for cell in instrument(forward, plain).__closure__ if cell.cell_contents is forward]
    assert own is forward


def test_bound_methods_and_modules_give_bound_callables(recorder):
    layer = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    for function in (layer, layer.forward, functools.partial(torch.nn.Linear.forward, layer)):
        record = recorder()
        assert torch.equal(instrument(function, record)(x), layer(x))
        assert record.names == ["F_linear_0"]
    assert instrument(layer, plain).__self__ is layer


def test_objects_that_are_called():
    class Twice:
        def __call__(self, x):
            return abs(x) * 2

    assert list(analyse(Twice()).operations) == ["abs_0"]
    assert instrument(Twice(), lambda *call: 7)(1) == 14


def test_a_function_held_by_a_partial_or_a_method_in_a_closure(recorder):
    def inner(x):
        return abs(x)

    def by_partial(function):
        held = functools.partial(function)

        @functools.wraps(function)
        def wrapper(x):
            return held(x)

        return wrapper

    def by_helper(function):
        def helper(x):
            return function(x)

        @functools.wraps(function)
        def wrapper(x):
            return helper(x)

        return wrapper

    for wrap in (by_partial, by_helper):
        record = recorder()
        assert instrument(wrap(inner), record)(-3) == 3
        assert record.names == ["abs_0"]


def test_a_function_given_to_a_partial(recorder):
    def inner(x):
        return abs(x)

    def patched(original, x):
        return original(x) + 1

    forward = functools.update_wrapper(functools.partial(patched, inner), inner)
    record = recorder()
    assert instrument(forward, record)(-3) == 4
    assert record.names == ["abs_0"]


class Note(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        return (args[0] + 1, *args[1:]), kwargs

    def post_forward(self, module, output):
        return output * 2


@pytest.mark.parametrize("append", [False, True])
def test_a_forward_replaced_by_accelerate(recorder, append):
    layer = torch.nn.Linear(3, 3)
    x = torch.randn(2, 3)
    plain_layer = layer.forward
    add_hook_to_module(layer, Note())
    if append:
        add_hook_to_module(layer, Note(), append=True)
        assert isinstance(layer._hf_hook, SequentialHook)
    before = dict(vars(layer))
    assert list(analyse(layer).operations) == ["F_linear_0"]
    record = recorder()
    assert torch.equal(instrument(layer, record)(x), layer(x))
    assert record.names == ["F_linear_0"]
    instead = torch.ones(2, 3)
    assert torch.equal(instrument(layer, recorder(F_linear_0=instead))(x), instead * (4 if append else 2))
    assert dict(vars(layer)) == before
    assert not torch.equal(layer(x), plain_layer(x))


def test_a_wrapper_that_cannot_be_followed_is_named():
    @functools.lru_cache
    def cached(x):
        return abs(x)

    class Wrapper:
        def __init__(self, function):
            functools.update_wrapper(self, function)

        def __call__(self, x):
            return self.__wrapped__(x)

    @Wrapper
    def held(x):
        return abs(x)

    for function in (cached, held):
        with pytest.raises(SourceError, match="wraps a function in a way that cannot be followed"):
            instrument(function, plain)


def test_a_wrapper_out_of_reach_and_without_source_is_named():
    def inner(x):
        return abs(x)

    scope = {"table": {"inner": inner}}
    exec("def outer(x):\n    return table['inner'](x)\n", scope)
    outer = scope["outer"]
    outer.__wrapped__ = inner
    with pytest.raises(SourceError, match=r"outer wraps .*inner out of reach: outer has no Python source"):
        instrument(outer, plain)


def test_a_function_that_wraps_itself_is_refused():
    def function(x):
        return x

    function.__wrapped__ = function
    with pytest.raises(SourceError, match="wraps itself"):
        analyse(function)
