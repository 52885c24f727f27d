"""`with loss.backward():` gives plain autograd's gradients, bit for bit, and refuses what there is not."""

import _thread
import gc
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.nn import Linear, Module, ModuleList
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight import LanguageModel, NNsight
from nnsight.errors import EditError, GradientError, OutOfOrderWarning

pytestmark = pytest.mark.timeout(20)
PLAIN_BACKWARD = torch.Tensor.backward


class Mix(Module):
    def __init__(self):
        super().__init__()
        self.qkv = Linear(6, 18)
        self.out = Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).split(6, dim=-1)
        return self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class Block(Module):
    def __init__(self):
        super().__init__()
        self.mix = Mix()
        self.mlp = Linear(6, 6)

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.mlp(x)


class Net(Module):
    def __init__(self):
        super().__init__()
        self.first = Linear(5, 6)
        self.blocks = ModuleList(Block() for _ in range(3))
        self.head = Linear(6, 4)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net()


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def x():
    torch.manual_seed(2)
    return torch.rand(2, 3, 5)


@pytest.fixture(scope="module")
def gpt2_module():
    torch.manual_seed(3)
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(autouse=True)
def nothing_stays():
    threads = set(threading.enumerate())
    yield
    assert not {t for t in threading.enumerate() if t.name == "nnsight-backward"} - threads
    assert "grad" not in vars(torch.Tensor)


def parameter_grads(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        other = second[name]
        assert (value is None and other is None) or torch.equal(value, other), name
    return True


def plainly(net, x, loss_of, edits=None, passes=1):
    """Gradients of the outputs of `net`'s modules, and of its parameters, by plain hooks."""
    grads, handles = {}, []
    for name, module in net.named_modules():

        def keep(module, args, output, name=name):
            if isinstance(output, torch.Tensor):
                if edits and name in edits:
                    output.register_hook(edits[name])
                output.register_hook(lambda grad: grads.__setitem__(name, grad.clone()))

        handles.append(module.register_forward_hook(keep))
    net.zero_grad()
    output = net(x)
    for handle in handles:
        handle.remove()
    loss = loss_of(output)
    for left in reversed(range(passes)):
        loss.backward(retain_graph=left > 0)
    grads_of_parameters = parameter_grads(net)
    net.zero_grad()
    return grads, grads_of_parameters


def squares(output):
    return (output**2).sum()


# --- reading -----------------------------------------------------------------------------------------------


def test_gradients_of_all_layers_are_those_of_plain_autograd(model, net, x):
    grads, of_parameters = plainly(net, x, squares)
    with model.trace(x):
        first = model.first.output
        mixes, mlps, outs = [], [], []
        for block in model.blocks:
            mixes.append(block.mix.output)
            mlps.append(block.mlp.output)
            outs.append(block.output)
        output = model.output
        with squares(output).backward():
            assert torch.equal(output.grad, grads[""])
            for i in (2, 1, 0):
                assert torch.equal(outs[i].grad, grads[f"blocks.{i}"])
                assert torch.equal(mlps[i].grad, grads[f"blocks.{i}.mlp"])
                assert torch.equal(mixes[i].grad, grads[f"blocks.{i}.mix"])
            assert torch.equal(first.grad, grads["first"])
    assert same(parameter_grads(net), of_parameters)


def test_documents_first_example(gpt2_module):
    model = LanguageModel(gpt2_module)
    ids = torch.tensor([[1, 2, 3, 4]])
    with model.trace(ids):
        hs = model.transformer.h[-1].output[0]
        hs.requires_grad_(True)

        logits = model.lm_head.output
        loss = logits.sum()

        with loss.backward():
            grad = hs.grad.save()

    gpt2_module.zero_grad()
    expected, _ = plainly(gpt2_module, ids, lambda output: output.logits.sum())
    assert torch.equal(grad, expected["transformer.h.2"])


def test_documents_second_example(gpt2_module):
    model = LanguageModel(gpt2_module)
    ids = torch.tensor([[1, 2, 3, 4]])
    with model.trace(ids):
        hidden = model.transformer.h[-1].output[0]
        hidden.requires_grad = True

        logits = model.lm_head.output

        with logits.sum().backward():
            logits_grad = logits.grad.save()
            hidden_grad = hidden.grad.save()

    gpt2_module.zero_grad()
    expected, _ = plainly(gpt2_module, ids, lambda output: output.logits.sum())
    assert torch.equal(logits_grad, torch.ones_like(logits))
    assert torch.equal(hidden_grad, expected["transformer.h.2"])


def test_gpt2_layers_in_both_spellings_of_a_blocks_output(gpt2_module):
    model = LanguageModel(gpt2_module)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])

    def loss_of(logits):
        return logits[:, -1].log_softmax(-1)[:, 3].sum()

    expected, of_parameters = plainly(gpt2_module, ids, lambda output: loss_of(output.logits))
    with model.trace(ids):
        outputs = [block.output for block in model.transformer.h]
        loss = loss_of(model.lm_head.output)
        with loss.backward():
            grads = [(out.grad, out[0].grad) for out in reversed(outputs)][::-1]
    assert same(parameter_grads(gpt2_module), of_parameters)
    gpt2_module.zero_grad()
    for i, (whole, first) in enumerate(grads):
        assert torch.equal(whole, expected[f"transformer.h.{i}"])
        assert torch.equal(first, whole)


def test_a_block_that_asks_for_nothing_is_plain_backward(model, net, x):
    _, of_parameters = plainly(net, x, squares)
    with model.trace(x):
        with squares(model.output).backward():
            pass
    assert same(parameter_grads(net), of_parameters)


def test_gradients_of_parameters(model, net, x):
    _, of_parameters = plainly(net, x, squares)
    with model.trace(x):
        out = model.blocks[1].output
        with squares(model.output).backward():
            head = model.head.weight.grad
            out.grad
            weight = model.first.weight.grad
    assert torch.equal(head, of_parameters["head.weight"])
    assert torch.equal(weight, of_parameters["first.weight"])
    assert same(parameter_grads(net), of_parameters)


def test_a_gradient_is_this_passs_while_the_attribute_accumulates(model, net, x):
    _, of_parameters = plainly(net, x, squares)
    _, of_both = plainly(net, x, squares, passes=2)
    for expected in (of_parameters, of_both):
        with model.trace(x):
            with squares(model.output).backward():
                grad = model.first.weight.grad
        assert torch.equal(grad, of_parameters["first.weight"])
        assert same(parameter_grads(net), expected)


def test_a_frozen_model_with_a_leaf_in_the_middle(model, net, x):
    net.requires_grad_(False)
    with model.trace(x):
        hidden = model.blocks[0].output
        hidden.requires_grad_(True)
        later = model.blocks[1].output
        with squares(model.output).backward():
            later_grad = later.grad
            grad = hidden.grad
    leaf = hidden.detach().requires_grad_(True)
    middle = net.blocks[1](leaf)
    middle.retain_grad()
    squares(net.head(net.blocks[2](middle))).backward()
    assert torch.equal(grad, leaf.grad)
    assert torch.equal(hidden.grad, leaf.grad)  # a leaf keeps it, as always
    assert torch.equal(later_grad, middle.grad)


def test_the_outputs_of_one_node_in_any_order(x):
    class Split(Module):
        def forward(self, x):
            return (x * 2).split(1, dim=-1)

    split = Split()
    model = NNsight(split)
    x.requires_grad_(True)
    with model.trace(x):
        a, b, c, d, e = model.output
        with (a * b + 3 * b * d + e).sum().backward():
            grads = b.grad, a.grad, e.grad, d.grad
            with pytest.raises(GradientError, match="not computed from it"):
                c.grad
            b.grad *= 2
            a.grad = torch.zeros_like(a)
    expected = torch.stack([torch.zeros_like(a), 2 * (a + 3 * d), c * 0, 3 * b, torch.ones_like(e)], -1)
    assert torch.equal(grads[0], 2 * (a + 3 * d))  # the live copy, as edited
    assert torch.equal(grads[2], torch.ones_like(e))
    assert torch.equal(x.grad, 2 * expected.squeeze(-2))


def test_a_tensor_edited_in_place_has_the_gradient_of_its_present_value(model, net, x):
    with model.trace(x):
        hidden = model.blocks[0].output
        hidden[:, 1] = 0
        with squares(model.output).backward():
            grad = hidden.grad
    mine = parameter_grads(net)
    net.zero_grad()

    def edit(module, args, output):
        output[:, 1] = 0
        output.retain_grad()
        kept.append(output)

    kept = []
    handle = net.blocks[0].register_forward_hook(edit)
    squares(net(x)).backward()
    handle.remove()
    assert torch.equal(grad, kept[0].grad)
    assert same(mine, parameter_grads(net))


def test_gradients_of_a_value_put_in_by_the_trace(model, net, x):
    steering = torch.zeros(6, requires_grad=True)
    with model.trace(x):
        moved = model.blocks[0].output + steering
        model.blocks[0].output = moved
        with squares(model.output).backward():
            moved_grad = moved.grad
            grad = steering.grad
    expected, _ = plainly(net, x, squares)
    assert torch.equal(moved_grad, expected["blocks.0"])
    assert torch.allclose(grad, expected["blocks.0"].sum((0, 1)))


def test_gradients_of_operations(model, net, x):
    with model.trace(x):
        scores = model.blocks[1].mix.source.torch_softmax_0.output
        projected = model.blocks[1].mix.source.self_out_0.output
        with squares(model.output).backward():
            projected_grad = projected.grad
            grad = scores.grad
    grads, _ = plainly(net, x, squares)
    assert torch.equal(projected_grad, grads["blocks.1.mix.out"])
    _, _, v = net.blocks[1].mix.qkv(net.blocks[0](net.first(x))).split(6, dim=-1)
    assert torch.equal(grad, grads["blocks.1.mix.out"] @ net.blocks[1].mix.out.weight @ v.transpose(-1, -2))


def test_inputs_leave_out_the_rest(model, net, x):
    expected, of_parameters = plainly(net, x, squares)
    with model.trace(x):
        first = model.first.output
        hidden = model.blocks[1].output
        with squares(model.output).backward(inputs=[net.blocks[1].mlp.weight]):
            grad = hidden.grad
            with pytest.raises(GradientError, match="reverse order"):
                first.grad
    assert torch.equal(grad, expected["blocks.1"])
    assert torch.equal(net.blocks[1].mlp.weight.grad, of_parameters["blocks.1.mlp.weight"])
    assert net.first.weight.grad is None


def test_gradient_argument_for_a_loss_of_many_numbers(model, net, x):
    start = torch.rand(2, 3, 4)
    expected, of_parameters = plainly(net, x, lambda output: (output * start).sum())
    for arguments in (((start,), {}), ((), {"gradient": start})):
        with model.trace(x):
            hidden = model.blocks[1].output
            with model.output.backward(*arguments[0], **arguments[1]):
                assert torch.equal(hidden.grad, expected["blocks.1"])
        assert same(parameter_grads(net), of_parameters)
        net.zero_grad()


# --- writing -----------------------------------------------------------------------------------------------


def assign(tensor, change):
    tensor.grad = change(tensor.grad)


def assign_unread(tensor, change):
    tensor.grad = change(torch.zeros_like(tensor))


def in_place(tensor, change):
    tensor.grad[:] = change(tensor.grad.clone())


def augmented(tensor, change):
    tensor.grad += change(tensor.grad) - tensor.grad


def cut(grad):
    grad = grad.clone()
    grad[:, 1:] = 0
    return grad


@pytest.mark.parametrize("name", ["", "blocks.2", "blocks.1.mlp", "blocks.1.mix", "blocks.0", "first"])
@pytest.mark.parametrize(
    ("way", "change"),
    [
        (assign, cut),
        (in_place, cut),
        (augmented, cut),
        (assign_unread, torch.ones_like),
        (in_place, torch.zeros_like),
    ],
)
def test_a_changed_gradient_flows_on_as_a_plain_hooks(model, net, x, name, way, change):
    grads, of_parameters = plainly(net, x, squares, {name: change})
    with model.trace(x):
        first = model.first.output
        outs = {"first": first}
        for i in range(3):
            outs[f"blocks.{i}.mix"] = model.blocks[i].mix.output
            outs[f"blocks.{i}.mlp"] = model.blocks[i].mlp.output
            outs[f"blocks.{i}"] = model.blocks[i].output
        outs[""] = model.output
        with squares(outs[""]).backward():
            way(outs[name], change)
            changed = outs[name].grad
            if name != "first":
                first_grad = first.grad
    assert torch.equal(changed, grads[name])
    if name != "first":
        assert torch.equal(first_grad, grads["first"])
    assert same(parameter_grads(net), of_parameters)


def test_a_change_reaches_one_path_of_a_residual_stream_only(model, net, x):
    """Autograd lets one gradient tensor stand on both sides of an addition."""
    grads, of_parameters = plainly(net, x, squares, {"blocks.2.mlp": torch.zeros_like})
    with model.trace(x):
        before = model.blocks[1].output
        mlp = model.blocks[2].mlp.output
        with squares(model.output).backward():
            mlp.grad.zero_()
            assert torch.equal(before.grad, grads["blocks.1"])
    assert same(parameter_grads(net), of_parameters)


def test_what_a_block_was_given_is_its_own_afterwards(model, net, x):
    _, of_parameters = plainly(net, x, squares)
    with model.trace(x):
        outs = [block.output for block in model.blocks]
        with squares(model.output).backward():
            for out in reversed(outs):
                grad = out.grad
                following = model.first.weight if out is outs[0] else None
                if following is not None:
                    following.grad
                    grad.zero_()
    assert same(parameter_grads(net), of_parameters)


def test_a_changed_gradient_is_what_retain_grad_keeps(model, x):
    with model.trace(x):
        hidden = model.blocks[1].output
        hidden.retain_grad()
        with squares(model.output).backward(retain_graph=True):
            hidden.grad = torch.full_like(hidden, 2.0)
        assert torch.equal(hidden.grad, torch.full_like(hidden, 2.0))
        with squares(model.output).backward():
            hidden.grad = torch.full_like(hidden, 3.0)
    assert torch.allclose(hidden.grad, torch.full_like(hidden, 5.0))


def test_the_gradient_of_a_leaf_is_changed_before_it_is_added(model, net, x):
    net.first.weight.grad = torch.ones_like(net.first.weight)
    with model.trace(x):
        with squares(model.output).backward():
            net.first.weight.grad = torch.full_like(net.first.weight, 2.0)
    assert torch.equal(net.first.weight.grad, torch.full_like(net.first.weight, 3.0))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3),
        torch.zeros(2, 3, 6, dtype=torch.float64),
        torch.zeros(2, 3, 6, device="meta"),
        None,
        0,
    ],
    ids=["shape", "dtype", "device", "None", "number"],
)
def test_a_value_that_is_no_gradient_of_the_tensor_is_refused_where_it_is_assigned(model, x, value):
    with pytest.raises(EditError, match="gradient"):
        with model.trace(x):
            hidden = model.blocks[1].output
            with squares(model.output).backward():
                hidden.grad = value


# --- several backward passes -------------------------------------------------------------------------------


def test_several_backward_passes(model, net, x):
    first, of_first = plainly(net, x, squares)
    second, of_second = plainly(net, x, torch.sum)
    with model.trace(x):
        hidden = model.blocks[1].output
        output = model.output
        with squares(output).backward(retain_graph=True):
            grad_1 = hidden.grad
        with output.sum().backward():
            grad_2 = hidden.grad
    assert torch.equal(grad_1, first["blocks.1"])
    assert torch.equal(grad_2, second["blocks.1"])
    assert same(parameter_grads(net), {name: of_first[name] + of_second[name] for name in of_first})


def test_a_second_pass_through_a_freed_graph_is_pytorchs_error_at_the_line_that_asks(model, x):
    with pytest.raises(RuntimeError, match="second time") as caught:
        with model.trace(x):
            hidden = model.blocks[1].output
            output = model.output
            with squares(output).backward():
                hidden.grad
            with output.sum().backward():
                line = sys._getframe().f_lineno + 1
                hidden.grad
    assert caught.traceback[0].lineno + 1 == line


def test_blocks_inside_blocks(model, net, x):
    first, _ = plainly(net, x, squares)
    second, _ = plainly(net, x, torch.sum)
    with model.trace(x):
        inner, hidden = model.first.output, model.blocks[1].output
        output = model.output
        with squares(output).backward(retain_graph=True):
            outer_output = output.grad
            with output.sum().backward(retain_graph=True):
                nested_output, nested = output.grad, hidden.grad
            grad = hidden.grad
            with output.sum().backward(retain_graph=True):
                pass
            assert torch.equal(inner.grad, first["first"])
    assert torch.equal(outer_output, first[""])
    assert torch.equal(nested_output, second[""])
    assert torch.equal(nested, second["blocks.1"])
    assert torch.equal(grad, first["blocks.1"])


def test_autograd_and_plain_backward_inside_a_block(model, net, x):
    first, of_first = plainly(net, x, squares)
    second, of_second = plainly(net, x, torch.sum)
    with model.trace(x):
        hidden = model.blocks[1].output
        output = model.output
        with squares(output).backward(retain_graph=True):
            output.grad
            (other,) = torch.autograd.grad(output.sum(), hidden, retain_graph=True)
            output.sum().backward(retain_graph=True)
            grad = hidden.grad
    assert torch.equal(other, second["blocks.1"])
    assert torch.equal(grad, first["blocks.1"])
    assert same(parameter_grads(net), {name: of_second[name] + of_first[name] for name in of_first})


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_of_gradients(model, net, x):
    with model.trace(x):
        hidden = model.blocks[1].output
        with squares(model.output).backward(create_graph=True):
            grad = hidden.grad
            assert grad.requires_grad
        penalty = torch.autograd.grad((grad**2).sum(), net.first.weight)[0]
    out = net.blocks[1](net.blocks[0](net.first(x)))
    (plain,) = torch.autograd.grad(squares(net.head(net.blocks[2](out))), out, create_graph=True)
    assert torch.equal(grad, plain)
    assert torch.equal(penalty, torch.autograd.grad((plain**2).sum(), net.first.weight)[0])
    net.zero_grad()


# --- plain autograd stays plain ----------------------------------------------------------------------------


def test_plain_backward_with_retain_grad(model, net, x):
    grads, of_parameters = plainly(net, x, squares)
    with model.trace(x):
        hidden = model.blocks[1].output.save()
        hidden.retain_grad()
        loss = squares(model.output)
        returned = loss.backward()
        inside = hidden.grad
    assert returned is None
    assert torch.equal(inside, grads["blocks.1"])
    assert torch.equal(hidden.grad, grads["blocks.1"])
    assert same(parameter_grads(net), of_parameters)


def test_only_a_with_statement_makes_a_block(model, x):
    def helper(loss):
        return loss.backward(retain_graph=True)

    with model.trace(x):
        loss = squares(model.output)
        assert loss.backward(retain_graph=True) is None
        assert helper(loss) is None
        assert [loss.backward(retain_graph=True) for _ in range(2)] == [None, None]
        assert (loss.backward(retain_graph=True), 1)[0] is None
        with nullcontext(loss.backward(retain_graph=True)) as given:
            assert given is None
        options = {"retain_graph": True}
        with nullcontext(), loss.backward(**options) as block, nullcontext():
            assert block is not None
        with loss.backward(
            retain_graph=True,
        ):
            pass
        exec("with loss.backward(retain_graph=True) as found: pass\nassert found is not None", {"loss": loss})


def test_a_with_statement_is_told_under_a_trace_function(model, x):
    lines = []

    def tracer(frame, event, argument):
        lines.append(event)
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with model.trace(x):
            hidden = model.blocks[1].output
            loss = squares(model.output)
            loss.backward(retain_graph=True)
            with loss.backward():
                grad = hidden.grad
    finally:
        sys.settrace(before)
    assert grad is not None
    assert lines


def test_outside_a_trace_nothing_is_different(model, net, x):
    with pytest.raises((TypeError, AttributeError)):
        with squares(net(x)).backward():
            pass
    with model.trace(x):
        assert torch.Tensor.backward is not PLAIN_BACKWARD
        with squares(model.output).backward():
            assert "grad" in vars(torch.Tensor)
        assert "grad" not in vars(torch.Tensor)


def test_another_thread_has_plain_autograd_meanwhile(model, net, x):
    grads, _ = plainly(net, x, squares)

    def elsewhere():
        leaf = torch.ones(3, requires_grad=True)
        result = (leaf**2).sum().backward()
        return result, leaf.grad

    with ThreadPoolExecutor(1) as pool, model.trace(x):
        first, hidden = model.first.output, model.blocks[1].output
        with squares(model.output).backward():
            hidden.grad
            result, grad = pool.submit(elsewhere).result()
            assert torch.equal(first.grad, grads["first"])
    assert result is None
    assert torch.equal(grad, 2 * torch.ones(3))


def test_pytorchs_own_code_sees_the_ordinary_attribute(model, net, x):
    _, of_parameters = plainly(net, x, squares)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with model.trace(x):
        hidden = model.blocks[1].output
        with squares(model.output).backward():
            hidden.grad
            optimizer.step()
            optimizer.zero_grad()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    cleared = ("head", "blocks.2")  # what backward had reached by then
    expected = {n: None if n.startswith(cleared) else grad for n, grad in of_parameters.items()}
    assert same(parameter_grads(net), expected)


def test_users_own_hooks_and_retained_gradients(model, net, x):
    grads, of_parameters = plainly(net, x, squares, {"blocks.1": lambda grad: grad * 2})
    seen = []
    with model.trace(x):
        first, hidden = model.first.output, model.blocks[1].output
        hidden.register_hook(lambda grad: grad * 2)
        first.register_hook(seen.append)
        first.retain_grad()
        with squares(model.output).backward():
            assert torch.equal(hidden.grad, grads["blocks.1"])
    assert torch.equal(seen[0], grads["first"])
    assert torch.equal(first.grad, grads["first"])
    assert same(parameter_grads(net), of_parameters)


def test_checkpointed_layers(net, x):
    class Saving(Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            x = self.net.first(x)
            for block in self.net.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.net.head(x)

    grads, of_parameters = plainly(net, x, squares)
    model = NNsight(Saving())
    with model.trace(x):
        first = model.net.first.output
        with squares(model.output).backward():
            grad = first.grad
    assert torch.equal(grad, grads["first"])
    assert same(parameter_grads(net), of_parameters)


def test_the_model_may_run_on_between_gradients(model, net, x):
    grads, _ = plainly(net, x, squares)
    with model.trace(x):
        hidden, second = model.blocks[0].output, model.blocks[1].output
        with squares(second).backward(retain_graph=True):
            second.grad
            output = model.output
            hidden.grad
        with squares(output).backward():
            assert torch.equal(second.grad, grads["blocks.1"])
            assert torch.equal(hidden.grad, grads["blocks.0"])


def test_requires_grad_is_set_as_ever_but_where_it_holds_already(model, net, x):
    with model.trace(x):
        hidden = model.blocks[1].output
        hidden.requires_grad = True
        leaf = torch.ones(2)
        leaf.requires_grad = True
        with pytest.raises(RuntimeError, match="leaf"):
            hidden.requires_grad = False
    assert leaf.requires_grad
    with pytest.raises(RuntimeError, match="leaf"):
        net.first(x).requires_grad = True


# --- modes -------------------------------------------------------------------------------------------------


def test_autocast(model, net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads, of_parameters = plainly(net, x, lambda output: squares(output.float()))
        with model.trace(x):
            hidden = model.blocks[1].output
            with squares(model.output.float()).backward():
                grad = hidden.grad
    assert torch.equal(grad, grads["blocks.1"])
    assert same(parameter_grads(net), of_parameters)


def test_a_body_without_gradients_reads_them_from_a_trace_with_them(model, net, x):
    grads, of_parameters = plainly(net, x, squares)
    with model.trace(x):
        hidden = model.blocks[1].output
        loss = squares(model.output)
        with torch.no_grad(), loss.backward():
            grad = hidden.grad
            hidden.grad = grad.clone()
    assert torch.equal(grad, grads["blocks.1"])
    assert same(parameter_grads(net), of_parameters)


def test_modes_reach_the_thread_of_backward(model, x):
    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((torch.is_autocast_enabled("cpu"), torch.ones(1).device.type))
            return grad

    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        with model.trace(x):
            hidden = model.blocks[1].output
            loss, start = squares(Watch.apply(hidden)), torch.ones((), device="cpu")
            loss.backward(gradient=start, retain_graph=True)
            with loss.backward(gradient=start):
                hidden.grad
    assert seen[0] == seen[1]
    assert seen[0][0]


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net = Net()
        model = NNsight(net)
        with model.trace(torch.rand(2, 3, 5)):
            hidden = model.blocks[1].output
            with squares(model.output).backward():
                grad = hidden.grad
                hidden.grad = grad * 2
    assert grad.shape == (2, 3, 6)
    assert net.first.weight.grad.shape == (6, 5)


# --- deferred blocks ---------------------------------------------------------------------------------------


def test_in_an_invoke(model, net, x):
    grads, of_parameters = plainly(net, x, squares, {"blocks.1": torch.zeros_like})
    with model.trace() as tracer:
        with tracer.invoke(x):
            first = model.first.output
            hidden = model.blocks[1].output
            with squares(model.output).backward():
                hidden.grad[:] = 0
                grad = first.grad.save()
    assert torch.equal(grad, grads["first"])
    assert same(parameter_grads(net), of_parameters)


def test_in_several_invokes(model, net, x):
    """The rows of an invoke are what the model goes on with: they have gradients like any value."""
    expected = [plainly(net, row[None], squares) for row in x]
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            hidden_1 = model.blocks[1].output
            with squares(model.output).backward(retain_graph=True):
                grad_1 = hidden_1.grad.save()
        with tracer.invoke(x[1:]):
            hidden_2 = model.blocks[1].output
            with squares(model.output).backward():
                grad_2 = hidden_2.grad.save()
    assert torch.allclose(grad_1, expected[0][0]["blocks.1"], atol=1e-6)
    assert torch.allclose(grad_2, expected[1][0]["blocks.1"], atol=1e-6)


def trace_with_blocks_side_by_side(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            first_1, hidden_1 = model.first.output, model.blocks[0].output
            with squares(hidden_1).backward(retain_graph=True):
                hidden_1.grad
                model.blocks[2].output
                grad_1 = first_1.grad.save()
        with tracer.invoke(x[1:]):
            first_2, hidden_2 = model.first.output, model.blocks[1].output
            with squares(hidden_2).backward(retain_graph=True):
                hidden_2.grad
                model.blocks[2].output
                grad_2 = first_2.grad.save()
    return grad_1, grad_2


def test_blocks_of_two_invokes_side_by_side(model, net, x):
    grad_1, grad_2 = trace_with_blocks_side_by_side(model, x)
    first = net.first(x)
    hidden = net.blocks[0](first)
    (expected_1,) = torch.autograd.grad(squares(hidden), first, retain_graph=True)
    (expected_2,) = torch.autograd.grad(squares(net.blocks[1](hidden)), first)
    assert torch.allclose(grad_1, expected_1[:1], atol=1e-6)
    assert torch.allclose(grad_2, expected_2[1:], atol=1e-6)


def test_blocks_side_by_side_are_refused_where_a_device_has_one_thread(net, x):
    with pytest.raises(GradientError, match="stands in the middle"):
        trace_with_blocks_side_by_side(NNsight(net.to("meta")), x.to("meta"))


def test_an_error_in_an_invoke_ends_its_backward(model, net, x):
    with pytest.raises(ZeroDivisionError):
        with model.trace() as tracer:
            with tracer.invoke(x):
                hidden = model.blocks[1].output
                with squares(model.output).backward():
                    hidden.grad
                    1 / 0
    assert net.first.weight.grad is None


def test_threads_of_ones_own(net, x):
    grads, _ = plainly(net, x, squares)
    net.requires_grad_(False)

    def trace(_):
        model = NNsight(net)
        with model.trace(x):
            first = model.first.output.requires_grad_(True)
            hidden = model.blocks[1].output
            with squares(model.output).backward():
                return hidden.grad, first.grad

    with ThreadPoolExecutor(4) as pool:
        for hidden_grad, first_grad in pool.map(trace, range(40)):
            assert torch.equal(hidden_grad, grads["blocks.1"])
            assert torch.equal(first_grad, grads["first"])


# --- what cannot be had ------------------------------------------------------------------------------------


def test_a_gradient_that_has_been_passed_is_refused(model, net, x):
    grads, _ = plainly(net, x, squares)
    with model.trace(x):
        early, late = model.first.output, model.blocks[1].output
        with squares(model.output).backward():
            grad = early.grad
            with pytest.raises(GradientError, match=r"line \d+ of test_gradient.py.*reverse order"):
                late.grad
            with pytest.raises(GradientError, match="reverse order"):
                late.grad = torch.zeros_like(late)
            assert torch.equal(early.grad, grad)
    assert torch.equal(grad, grads["first"])


def test_a_gradient_off_the_path_that_has_been_passed_is_refused(model, x):
    with model.trace(x):
        hidden = model.blocks[1].output
        with squares(model.output).backward():
            hidden.grad
            with pytest.raises(GradientError, match="reverse order"):
                model.head.weight.grad


def test_a_gradient_asked_for_again_is_the_same_and_cannot_be_changed(model, net, x):
    with pytest.raises(GradientError, match="reaches nothing"):
        with model.trace(x):
            early, late = model.first.output, model.blocks[1].output
            with squares(model.output).backward():
                grad = late.grad
                early.grad
                assert late.grad is grad
                with pytest.raises(GradientError, match="reverse order"):
                    late.grad = grad * 2
                late.grad[:] = 0


def test_a_tensor_that_the_loss_was_not_computed_from_is_refused(model, x):
    with model.trace(x):
        hidden = model.blocks[1].output
        copy, row = hidden * 1, hidden[0]
        early_loss = squares(hidden)
        output = model.output
        with squares(output).backward(retain_graph=True):
            for tensor in (copy, row):
                with pytest.raises(GradientError, match="not computed from it"):
                    tensor.grad
                with pytest.raises(GradientError, match="not computed from it"):
                    tensor.grad = torch.zeros_like(tensor)
        with early_loss.backward():
            with pytest.raises(GradientError, match="not computed from it"):
                output.grad


def test_a_tensor_without_gradient_is_refused(model, x):
    with model.trace(x):
        hidden = model.blocks[1].output.detach()
        with squares(model.output).backward():
            with pytest.raises(GradientError, match="does not require grad"):
                hidden.grad
            with pytest.raises(GradientError, match="does not require grad"):
                x.grad


def test_a_tensor_served_by_a_second_pass_is_refused(model, x):
    with model.trace(x):
        output = model.output
        with pytest.warns(OutOfOrderWarning):
            hidden = model.blocks[1].output
        with squares(output).backward():
            with pytest.raises(GradientError, match="order of the forward"):
                hidden.grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_without_gradients_is_refused(model, x, mode):
    with mode(), model.trace(x):
        loss = squares(model.output)
        with pytest.raises(GradientError, match="no_grad"):
            with loss.backward():
                pass


def test_a_loss_of_a_frozen_model_is_refused(model, net, x):
    net.requires_grad_(False)
    with pytest.raises(GradientError, match="requires_grad_"):
        with model.trace(x):
            with model.output.sum().backward():
                pass


def test_a_loss_of_many_numbers_is_refused(model, x):
    with pytest.raises(GradientError, match="one number"):
        with model.trace(x):
            with model.output.backward():
                pass


def test_a_block_is_entered_once(model, x):
    with model.trace(x):
        loss = squares(model.output)
        with loss.backward(retain_graph=True) as block:
            pass
        with pytest.raises(GradientError, match="once"):
            with block:
                pass


# --- errors ------------------------------------------------------------------------------------------------


def test_an_error_in_the_body_ends_backward_where_it_stands(model, net, x):
    ran = []
    with pytest.raises(ZeroDivisionError):
        with model.trace(x):
            first, hidden = model.first.output, model.blocks[1].output
            first.register_hook(ran.append)
            with squares(model.output).backward():
                hidden.grad
                1 / 0
    assert ran == []
    assert net.first.weight.grad is None
    assert net.head.weight.grad is not None


def test_the_graph_is_as_it_was_after_an_error(model, net, x):
    grads, _ = plainly(net, x, squares)
    with model.trace(x):
        hidden = model.blocks[1].output
        loss = squares(model.output)
        with pytest.raises(ZeroDivisionError):
            with loss.backward(retain_graph=True):
                hidden.grad = torch.zeros_like(hidden)
                1 / 0
        (grad,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(grad, grads["blocks.1"])


def test_an_error_of_backward_reaches_the_line_that_waits(model, x):
    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise LookupError("no way back")

    for wait in (True, False):
        with pytest.raises(LookupError, match="no way back"):
            with model.trace(x):
                first, hidden = model.first.output, model.blocks[1].output
                model.blocks[1].output = Refuse.apply(hidden)
                output = model.output
                with squares(output).backward():
                    output.grad
                    if wait:
                        first.grad
                        pytest.fail("not reached")


def test_a_value_changed_in_place_under_backward_is_pytorchs_error(model, x):
    with pytest.raises(RuntimeError, match="inplace"):
        with model.trace(x):
            first = model.first.output
            hidden = model.blocks[1].output
            with (hidden**2).sum().backward():
                hidden.data.zero_()
                with torch.no_grad():
                    hidden.zero_()
                first.grad


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals")
def test_an_interrupt_while_backward_runs(model, net, x):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ended = []

    def slow(grad):
        _thread.interrupt_main()
        time.sleep(0.3)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        with model.trace(x):
            first, hidden = model.first.output, model.blocks[1].output
            hidden.register_hook(slow)
            with squares(model.output).backward():
                first.grad
    assert ended == [True]
    assert net.first.weight.grad is None


def test_nothing_is_kept_alive(model, x):
    gc.collect()
    gc.disable()
    try:
        with model.trace(x):
            hidden = model.blocks[1].output
            loss = squares(model.output)
            with loss.backward():
                grad = hidden.grad
                hidden.grad = grad * 2
        references = [weakref.ref(hidden), weakref.ref(loss), weakref.ref(grad)]
        del hidden, loss, grad
        assert [reference() for reference in references] == [None, None, None]
    finally:
        gc.enable()
