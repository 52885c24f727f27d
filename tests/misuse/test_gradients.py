"""Gradients that cannot be had."""

import pytest
import torch

from nnsight.errors import EditError, GradientError

pytestmark = pytest.mark.timeout(10, func_only=True)


@pytest.mark.parametrize("form", ["with", "plain"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(model, x, refused, mode, form):
    with refused(GradientError, "does not require grad.*open the trace with gradients on"):
        with mode(), model.trace(x):
            hidden = model.first.output
            if form == "with":
                with model.output.sum().backward():
                    hidden.grad
            else:
                model.output.sum().backward()


def test_a_frozen_model(model, net, x, refused):
    net.requires_grad_(False)
    with refused(GradientError, r"call hidden\.requires_grad_\(True\) on a value as soon as you have read it"):
        with model.trace(x):
            with model.output.sum().backward():
                pass
    with model.trace(x):
        hidden = model.first.output
        hidden.requires_grad_(True)
        with model.output.sum().backward():
            gradient = hidden.grad
    assert gradient.shape == (2, 4)
    net.requires_grad_(True)


def test_the_wrong_order(model, net, x, refused):
    with refused(
        GradientError,
        r"asked for at line \d+ of test_gradients.py.*reverse order of the forward",
    ):
        with model.trace(x):
            first, middle = model.first.output, model.middle.output
            with model.output.sum().backward():
                first.grad, middle.grad


@pytest.mark.parametrize("make", [torch.clone, lambda hidden: hidden[:, 0], lambda hidden: hidden * 2])
def test_what_the_loss_was_not_computed_from(model, x, refused, make):
    with refused(
        GradientError, r"the loss was not computed from it.*put yours in its place: `module\.output = tensor`"
    ):
        with model.trace(x):
            mine = make(model.first.output)
            with model.output.sum().backward():
                mine.grad


def test_what_requires_no_gradient(model, x, refused):
    with refused(GradientError, "it was computed from frozen values.*Read it in the order of the forward"):
        with model.trace(x):
            mine = model.first.output.detach()
            with model.output.sum().backward():
                mine.grad


def test_a_value_of_a_second_pass(model, x, refused):
    with refused(GradientError, "was read after its place in the forward had passed"):
        with pytest.warns(UserWarning, match="second forward pass"), model.trace(x):
            output = model.output
            late = model.first.output
            with output.sum().backward():
                late.grad


def test_a_loss_of_many_numbers(model, x, refused):
    with refused(GradientError, r"has the shape \[2, 2\]: write `with tensor\.sum\(\)\.backward\(\):`"):
        with model.trace(x):
            with model.output.backward():
                pass


@pytest.mark.parametrize("nested", [True, False])
def test_a_block_entered_twice(model, x, refused, nested):
    with refused(GradientError, r"can be entered once: call loss\.backward\(\) again"):
        with model.trace(x):
            model.first.output
            with model.output.sum().backward() as block:
                if nested:
                    with block:
                        pass
            with block:
                pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(3), "the shape of its tensor"),
        (torch.ones(2, 4).double(), "the dtype of its tensor"),
        (3, r"write `tensor\.grad = torch\.zeros_like"),
        (None, r"write `tensor\.grad = torch\.zeros_like"),
    ],
)
def test_what_is_no_gradient(model, x, refused, value, text):
    with refused(EditError, text):
        with model.trace(x):
            hidden = model.first.output
            with model.output.sum().backward():
                hidden.grad = value


def test_a_graph_that_is_used_up_is_pytorchs_own_error(model, x):
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        with model.trace(x):
            hidden = model.first.output
            loss = model.output.sum()
            with loss.backward():
                hidden.grad
            with loss.backward():
                hidden.grad


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("asked", [True, False])
def test_an_error_inside(model, net, x, refused, kind, asked):
    with refused(kind, "on purpose"):
        with model.trace(x):
            hidden = model.first.output
            with model.output.sum().backward():
                if asked:
                    hidden.grad
                raise kind("on purpose")
    assert net.first.weight.grad is None


def test_values_and_traces_inside(model, net, x):
    with model.trace(x):
        hidden = model.first.output
        with model.middle.output.sum().backward():
            with model.trace(x * 2):
                inner = model.first.output
            gradient = hidden.grad
            output = model.output
    assert torch.equal(inner, net.first(x * 2))
    assert torch.equal(output, net(x))
    assert gradient.shape == (2, 4)
    net.zero_grad()
