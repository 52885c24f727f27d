"""What invokes and blocks of the whole batch do at one place: each row is as if its input had been traced alone."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from nnsight import NNsight
from nnsight.errors import EditError, RowsError

pytestmark = pytest.mark.timeout(30)


class Inner(nn.Module):
    """Its output is a view of what its layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x.reshape(-1, 4)).reshape(x.shape)


class Net(nn.Module):
    """A residual stream around a branch, so that an input is held elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.viewed = Inner()
        self.branch = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = self.viewed(self.first(x))
        x = x + self.branch(x)
        return self.last(x)


class Several(nn.Module):
    """A dictionary and a number beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.make = Pair()
        self.use = Use()

    def forward(self, x):
        return self.use(self.make(x), scale=2.0)


class Pair(nn.Module):
    def forward(self, x):
        return {"one": x * 2, "two": x + 1}


class Use(nn.Module):
    def forward(self, pair, scale):
        return (pair["one"] + pair["two"]) * scale


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def xs():
    return torch.randn(3, 2, 3, 4, dtype=torch.float64).unbind()  # three inputs of [2, 3, 4]


PLACES = ("first.output", "viewed.output", "branch.input", "branch.0.output", "branch.output")


def value(model, place):
    path, _, kind = place.rpartition(".")
    return getattr(model.get(path), kind)


def alone(model, place, x, change=None, scale=None):
    """The output, and the gradient at a place, of one input traced alone."""
    with model.trace(x):
        h = value(model, place)
        if change is not None:
            h[:] = change(h)
        output = model.output
        with squares(output).backward():
            gradient = h.grad.clone()
            if scale is not None:
                h.grad = h.grad * scale
    return output.detach(), gradient


def squares(output):
    return (output**2).sum()


def halve(h):
    return h * 0.5


def in_place(_):
    return None


def parameter_grads(net):
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    return found


def near(a, b):
    return torch.allclose(a, b, atol=1e-12)


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", ["block", "retained", "hook", "autograd.grad"])
def test_the_gradient_of_an_invokes_rows(model, xs, place, way):
    grads = {}
    with model.trace() as tracer:
        for i in range(3):
            with tracer.invoke(xs[i]):
                h = value(model, place)
                if way == "retained":
                    h.retain_grad()
                elif way == "hook":
                    h.register_hook(lambda grad, i=i: grads.__setitem__(i, grad.clone()))
                loss = squares(model.output)
                if way == "block":
                    with loss.backward(retain_graph=True):
                        grads[i] = h.grad.clone()
                elif way == "autograd.grad":
                    grads[i] = torch.autograd.grad(loss, h, retain_graph=True)[0]
        if way in ("retained", "hook"):
            with tracer.invoke():
                squares(model.output).backward(retain_graph=True)
            with tracer.invoke(xs[0]):
                pass
    if way == "retained":
        assert near(h.grad, alone(model, place, xs[2])[1])
        return
    for i in range(3):
        assert near(grads[i], alone(model, place, xs[i])[1])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("whole", [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize("way", ["block", "retained"])
def test_the_whole_batchs_tensor_while_an_invoke_changes_its_rows(model, xs, place, whole, way):
    """Blocks of the whole batch before, between and after invokes, of which the second changes its rows in place."""
    expected = [alone(model, place, xs[0]), alone(model, place, xs[1], halve)]
    held, rows = [], []
    with model.trace() as tracer:
        if whole[0]:
            with tracer.invoke():
                hold(model, place, held, way)
        with tracer.invoke(xs[0]):
            hold(model, place, rows, way)
        if whole[1]:
            with tracer.invoke():
                hold(model, place, held, way)
        with tracer.invoke(xs[1]):
            x = value(model, place)
            x[:] = x * 0.5
            hold(model, place, rows, way)
        if whole[2]:
            with tracer.invoke():
                hold(model, place, held, way)
        with tracer.invoke():
            output = model.output
            if way == "retained":
                squares(output).backward()
                grads = [h.grad.clone() for h in (*held, *rows)]
            else:
                with squares(output).backward():
                    grads = [h.grad.clone() for h in (*held, *rows)]
    both = torch.cat([gradient for _, gradient in expected])
    assert near(output, torch.cat([out for out, _ in expected]))
    for gradient in grads[: len(held)]:
        assert near(gradient, both)
    assert near(grads[-2], expected[0][1])
    assert near(grads[-1], expected[1][1])


def hold(model, place, kept, way):
    h = value(model, place)
    if way == "retained":
        h.retain_grad()
    kept.append(h)


def test_the_rows_of_a_view_changed_in_place_by_one_invoke(model, xs):
    """The whole tensor that a later block holds is what the model goes on with, also in the changed rows."""
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            pass
        with tracer.invoke(xs[1]):
            x = model.viewed.output
            x[:] = x * 0.5
        with tracer.invoke():
            h = model.viewed.output
            h.retain_grad()
            squares(model.output).backward()
    expected = [alone(model, "viewed.output", xs[0])[1], alone(model, "viewed.output", xs[1], halve)[1]]
    assert near(h.grad, torch.cat(expected))


@pytest.mark.parametrize("place", PLACES)
def test_a_changed_gradient_flows_on_in_its_own_rows_only(model, net, xs, place):
    alone(model, place, xs[0])
    alone(model, place, xs[1], scale=3.0)
    expected = parameter_grads(net)
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            whole = model.output
        with tracer.invoke(xs[1]):
            h = value(model, place)
            with (squares(whole) + squares(model.output)).backward():
                h.grad = h.grad * 3.0
    found = parameter_grads(net)
    assert all(near(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_changes_the_gradient_of_its_own_rows(model, net, xs, place):
    alone(model, place, xs[0])
    alone(model, place, xs[1], scale=3.0)
    expected = parameter_grads(net)
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            pass
        with tracer.invoke(xs[1]):
            value(model, place).register_hook(lambda grad: grad * 3.0)
        with tracer.invoke():
            squares(model.output).backward()
    found = parameter_grads(net)
    assert all(near(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ask", [lambda h: h.requires_grad_(True), lambda h: setattr(h, "requires_grad", True)])
@pytest.mark.parametrize("place", PLACES)
def test_a_frozen_model(model, net, xs, place, ask):
    expected = [alone(model, place, x) for x in xs]
    net.requires_grad_(False)
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            pass
        with tracer.invoke(xs[1]):
            h = value(model, place)
            ask(h)
            direct = squares(h)
            with squares(model.output).backward(retain_graph=True):
                gradient = h.grad.clone()
            with direct.backward():
                own = h.grad.clone()
    assert near(gradient, expected[1][1])
    assert near(own, 2 * h)


def test_the_gradient_attribute_of_rows(model, xs):
    with model.trace() as tracer:
        rows = []
        for i in range(2):
            with tracer.invoke(xs[i]):
                hold(model, "branch.input", rows, "retained")
        with tracer.invoke():
            loss = squares(model.output)
    first, second = rows
    assert first.retains_grad
    assert first.grad is None
    loss.backward(retain_graph=True)
    expected = alone(model, "branch.input", xs[0])[1], alone(model, "branch.input", xs[1])[1]
    first.grad = None
    assert not first.grad.any()
    assert near(second.grad, expected[1])
    loss.backward()
    assert near(first.grad, expected[0])
    assert near(second.grad, 2 * expected[1])
    first.grad = torch.ones_like(first)
    assert torch.equal(first.grad, torch.ones_like(first))
    assert near(second.grad, 2 * expected[1])
    with pytest.raises(EditError, match="has the shape of its tensor"):
        first.grad = torch.ones(4)
    with pytest.raises(EditError, match="A gradient is a tensor"):
        first.grad = 1


def test_rows_are_a_tensor_like_any(model, xs):
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            h = model.first.output.save()
        with tracer.invoke(xs[1]):
            pass
    file = io.BytesIO()
    torch.save(h, file)
    file.seek(0)
    assert torch.equal(torch.load(file), h)
    assert type(torch.load(io.BytesIO(file.getvalue()))) is torch.Tensor
    detached = h.detach()
    assert type(detached) is type(h * 1) is torch.Tensor
    assert torch.equal(copy.deepcopy(detached), h)
    assert not h.is_leaf
    assert h.requires_grad
    assert h.shape == (2, 3, 4)


# --- values ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["with gradients", "without", "in inference mode"])
def mode(request):
    modes = {"with gradients": torch.enable_grad, "without": torch.no_grad, "in inference mode": torch.inference_mode}
    return modes[request.param]


def edited(net, place, x, change):
    """The output for one input where `change` makes the value at a place, by a plain hook: in place if it returns None."""
    path, _, kind = place.rpartition(".")
    module = net.get_submodule(path)

    def before(_, args):
        return change(args[0])

    def after(_, args, output):
        return change(output)

    handle = module.register_forward_pre_hook(before) if kind == "input" else module.register_forward_hook(after)
    with handle, torch.no_grad():
        return net(x)


def put(model, place, new):
    path, _, kind = place.rpartition(".")
    setattr(model.get(path), kind, new)


@pytest.mark.parametrize("place", PLACES)
def test_the_whole_batch_assigns_where_an_invoke_has_read(model, net, xs, place, mode):
    with mode(), model.trace() as tracer:
        with tracer.invoke(xs[0]):
            value(model, place)
        with tracer.invoke(xs[1]):
            pass
        with tracer.invoke():
            put(model, place, value(model, place) * 0.5)
        with tracer.invoke():
            output = model.output.clone()
    assert near(output, torch.cat([edited(net, place, x, halve) for x in xs[:2]]))


@pytest.mark.parametrize("place", PLACES)
def test_one_invoke_changes_in_place_after_another_has_assigned(model, net, xs, place, mode):
    with mode(), model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(xs[0]):
            h = value(model, place)
            barrier()
            h[:] = 0
        with tracer.invoke(xs[1]):
            put(model, place, value(model, place) * 0.5)
            barrier()
        with tracer.invoke():
            output = model.output.clone()
    expected = [edited(net, place, xs[0], lambda h: in_place(h.zero_())), edited(net, place, xs[1], halve)]
    assert near(output, torch.cat(expected))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", [*itertools.permutations(["assign", "whole", "in place"])])
def test_a_block_of_the_whole_batch_among_invokes(model, net, xs, place, order, mode):
    """An invoke assigns, one edits in place, and a block of the whole batch edits in place, in any order."""
    steps = {
        "assign": lambda h: h * 0.5,
        "in place": lambda h: in_place(h.mul_(3)),
        "whole": lambda h: in_place(h.add_(1)),
    }
    with mode(), model.trace() as tracer:
        for step in order:
            if step == "whole":
                with tracer.invoke():
                    h = value(model, place)
                    h += 1
                    seen = value(model, place).clone()
            elif step == "assign":
                with tracer.invoke(xs[0]):
                    put(model, place, value(model, place) * 0.5)
                    mine = value(model, place).clone()
            else:
                with tracer.invoke(xs[1]):
                    x = value(model, place)
                    x *= 3
                    other = value(model, place).clone()
        with tracer.invoke():
            output = model.output.clone()

    def do(kinds):
        def change(h):
            replaced = False
            for kind in kinds:
                new = steps[kind](h)
                h, replaced = (h, replaced) if new is None else (new, True)
            return h if replaced else None

        return change

    own = {"assign": [s for s in order if s != "in place"], "in place": [s for s in order if s != "assign"]}
    expected = {kind: edited(net, place, x, do(own[kind])) for kind, x in (("assign", xs[0]), ("in place", xs[1]))}
    rows = [kind for kind in order if kind != "whole"]
    assert near(output, torch.cat([expected[kind] for kind in rows]))
    assert seen.shape == (4, 3, 4)
    assert mine.shape == other.shape == (2, 3, 4)


def test_what_an_invoke_assigned_is_what_it_reads(model, xs):
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            mine = torch.zeros_like(xs[0])
            model.first.output = mine
            assert model.first.output is mine
            mine[:, 0] = 1  # the model has not gone on
        with tracer.invoke(xs[1]):
            pass
        with tracer.invoke():
            given = model.first.output.clone()
    assert given[:2].sum() == 8
    assert torch.equal(given[2:], model.first(xs[1]))


def test_a_mapping_changed_item_by_item(xs):
    torch.manual_seed(0)
    model = NNsight(Several())
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            model.make.output["one"] = torch.zeros_like(xs[0])
        with tracer.invoke():
            model.make.output["two"] = model.make.output["two"] + model.make.output["one"]
        with tracer.invoke(xs[1]):
            model.make.output["one"][:] = 1
        with tracer.invoke():
            output = model.output.clone()
    first, second = xs[:2]
    assert near(output, torch.cat([(first + 1) * 2, (second + 1 + second * 2 + 1) * 2]))


def test_a_mapping_that_gets_another_item(xs):
    model = NNsight(Several())
    with model.trace() as tracer:
        with tracer.invoke():
            model.make.output["more"] = torch.zeros(3)
        with tracer.invoke(xs[0]):
            pass
        with tracer.invoke(xs[1]):
            pass
        with tracer.invoke():
            model.make.output["one"] = model.make.output["more"][0]
            output = model.output.clone()
    assert near(output, (torch.cat(xs[:2]) + 1) * 2)
    with pytest.raises(RowsError, match="cannot be told"):
        with model.trace() as tracer:
            with tracer.invoke(xs[0]):
                model.make.output
            with tracer.invoke():
                model.make.output["more"] = torch.zeros(3)
            with tracer.invoke(xs[1]):
                model.make.output


# --- what cannot be right is refused -----------------------------------------------------------------------


def test_a_copy_changed_in_place_while_the_model_holds_the_original(model, net, xs):
    """After one invoke's assignment the other's rows are a copy, which a residual stream does not see."""
    with pytest.raises(EditError, match=r"assigning its rows at model\.branch\.input.*Assign the changed value"):
        with model.trace() as tracer:
            with tracer.invoke(xs[0]):
                model.branch.input = model.branch.input * 2
            with tracer.invoke(xs[1]):
                model.branch[0].input[:] = 0
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            model.branch.input = model.branch.input * 2
        with tracer.invoke(xs[1]):
            model.branch[0].input = model.branch[0].input * 0
        with tracer.invoke():
            output = model.output
    expected = (
        edited(net, "branch.input", xs[0], lambda h: h * 2),
        edited(net, "branch.0.input", xs[1], torch.zeros_like),
    )
    assert near(output, torch.cat(expected))


def test_the_gradient_of_a_copy_is_that_of_the_original(model, xs):
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            model.branch.input = model.branch.input * 2
        with tracer.invoke(xs[1]):
            h = model.branch[0].input
            with squares(model.output).backward():
                gradient = h.grad.clone()
    assert near(gradient, alone(model, "branch.0.input", xs[1])[1])


def test_a_copy_changed_in_place_that_nobody_else_holds(model, net, xs):
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            model.first.output = model.first.output * 2
        with tracer.invoke(xs[1]):
            model.viewed.input[:] = 0
        with tracer.invoke():
            output = model.output.clone()
    expected = [
        edited(net, "first.output", xs[0], lambda h: h * 2),
        edited(net, "first.output", xs[1], torch.zeros_like),
    ]
    assert near(output, torch.cat(expected))


def test_a_value_changed_after_the_whole_batchs_was_made_of_it(model, xs):
    with pytest.raises(EditError, match="Read it again before you change it"):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(xs[0]):
                h = model.first.output
                barrier()
                h[:] = 0
            with tracer.invoke(xs[1]):
                model.first.output = model.first.output * 2
            with tracer.invoke():
                model.first.output
            with tracer.invoke(xs[2]):
                model.first.output = model.first.output * 2
                barrier()


def test_what_is_no_tensor_belongs_to_all_rows(xs):
    model = NNsight(Several())
    with pytest.raises(
        RowsError, match=r"model\.use\.input was assigned a value that differs.*tracer\.invoke\(\) without"
    ):
        with model.trace() as tracer:
            with tracer.invoke(xs[0]):
                args, kwargs = model.use.inputs
                model.use.inputs = args, {**kwargs, "scale": 3.0}
            with tracer.invoke(xs[1]):
                pass
    with model.trace() as tracer:
        with tracer.invoke(xs[0]):
            pass
        with tracer.invoke(xs[1]):
            pass
        with tracer.invoke():
            args, kwargs = model.use.inputs
            model.use.inputs = args, {**kwargs, "scale": 0.0}
            output = model.output
    assert not output.any()


def test_blocks_that_meet_before_the_forward_go_on_in_the_order_written():
    model = NNsight(Net())
    came = []
    with model.trace() as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(torch.rand(1, 4)):
            meet()
            came.append(model.first.input.shape)
        with tracer.invoke(torch.rand(1, 4)):
            meet()
            came.append(model.branch.output.shape)
    assert len(came) == 2
