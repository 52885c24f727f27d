"""On a GPU autograd calls hooks on the device's own thread, which stands still while a block looks around."""

import pytest
import torch
from torch.nn import Linear, ReLU, Sequential

from nnsight import NNsight

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Sequential(Linear(8, 8), ReLU(), Linear(8, 8), ReLU(), Linear(8, 4)).cuda()


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def x():
    return torch.rand(3, 8, device="cuda")


def squares(value):
    return (value**2).sum()


def plainly(net, x, loss_of=squares, edit=None):
    outs, value = [], x
    for layer in net:
        value = layer(value)
        value.retain_grad()
        outs.append(value)
    if edit is not None:
        outs[2].register_hook(edit)
    loss_of(value).backward()
    weights = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    return [out.grad for out in outs], weights


def test_gradients_read_and_changed(model, net, x):
    for edit in (None, lambda grad: grad * 2):
        grads, weights = plainly(net, x, edit=edit)
        with model.trace(x):
            outs = [layer.output for layer in model]
            with squares(outs[-1]).backward():
                for i in (4, 3, 2, 1, 0):
                    if edit is not None and i == 2:
                        outs[i].grad *= 2
                    assert torch.equal(outs[i].grad, grads[i])
        assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), weights, strict=True))
        net.zero_grad()


def test_autograd_inside_a_block_does_not_wait_for_the_thread_that_stands_still(model, net, x):
    grads, _ = plainly(net, x)
    others, _ = plainly(net, x, torch.sum)
    with model.trace(x):
        outs = [layer.output for layer in model]
        with squares(outs[-1]).backward(retain_graph=True):
            outs[3].grad
            (grad,) = torch.autograd.grad(outs[-1].sum(), outs[1], retain_graph=True)
            outs[-1].sum().backward(retain_graph=True)
            with outs[-1].sum().backward(retain_graph=True):
                nested = outs[2].grad
            assert torch.equal(outs[0].grad, grads[0])
    assert torch.equal(grad, others[1])
    assert torch.equal(nested, others[2])


def test_a_stream_of_the_bodys_own(model, net, x):
    grads, _ = plainly(net, x)
    with model.trace(x):
        first, middle, output = model[0].output, model[2].output, model.output
        with squares(output).backward():
            with torch.cuda.stream(torch.cuda.Stream()):
                middle.grad = middle.grad.mul(2).div(2)
            assert torch.equal(first.grad, grads[0])


def test_an_error_in_the_body(model, net, x):
    with pytest.raises(ZeroDivisionError):
        with model.trace(x):
            middle = model[2].output
            with squares(model.output).backward():
                middle.grad
                1 / 0
    assert net[0].weight.grad is None
    plainly(net, x)
