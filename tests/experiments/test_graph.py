"""The graph inspector: edges and their weights are those found by removing a node, and by plain autograd."""

import math

import pytest
import torch

from nnsight import LanguageModel, NNsight, errors
from nnsight.experiments import ModuleGraph, information_flow, trace_graph


class Net(torch.nn.Module):
    """Two branches into a stream, one of them unused, one that depends on the input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(9, 4)
        self.a, self.b, self.c, self.d, self.unused, self.head = (torch.nn.Linear(4, 4) for _ in range(6))
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, ids, extra=None):
        x = self.embed(ids)
        a = self.a(x).tanh()
        b = self.b(self.norm(x + a))
        x = x + a
        x += b  # in place
        self.unused(x)
        c = self.c(a.detach()) if extra is None else self.d(extra)
        return self.head(x * 2) + c


NODES = ["embed", "a", "b", "c", "d", "unused", "head"]


@pytest.fixture
def net():
    return NNsight(Net())


def edges(graph):
    return {edge[:2] for edge in graph.edges}


def test_edges_are_those_of_the_tensors(net):
    graph = trace_graph(net, torch.tensor([[1, 2, 3]]), modules=NODES)
    assert edges(graph) == {
        ("input", "embed"),
        ("embed", "a"),
        ("embed", "b"),
        ("a", "b"),
        *((name, target) for name in ("embed", "a", "b") for target in ("unused", "head")),
        ("head", "output"),
        ("c", "output"),
    }
    assert graph.nodes == ("input", "embed", "a", "b", "unused", "c", "head", "output")
    assert graph.feeders("b") == ("embed", "a")
    assert graph.readers("c") == ("output",)
    assert graph.shapes["a"] == (1, 3, 4)
    assert graph.metric is None


def test_edges_follow_the_run_not_the_source(net):
    graph = trace_graph(net, torch.tensor([[1]]), extra=torch.rand(1, 1, 4), modules=NODES)
    assert "c" not in graph.nodes
    assert graph.feeders("d") == ("input",)


def test_forward_is_that_of_the_plain_model_and_nothing_is_left_behind(net):
    ids = torch.tensor([[1, 2, 3]])
    plain, seen = net._model(ids), []
    before = {name: dict(vars(module)) for name, module in net._model.named_modules()}
    information_flow(net, ids, metric=lambda output: seen.append(output) or output.sum(), modules=NODES)
    assert torch.equal(seen[0], plain)
    assert all(parameter.grad is None for parameter in net._model.parameters())
    assert {name: dict(vars(module)) for name, module in net._model.named_modules()} == before


def attribution_by_hooks(module, inputs, node, metric):
    """A node's value times the metric's gradient, and the value, by plain autograd."""
    kept = []

    def keep(_module, _args, output):
        output = output[0] if isinstance(output, tuple) else output
        output.retain_grad()
        kept.append(output)

    with module.get_submodule(node).register_forward_hook(keep):
        metric(module(*inputs)).backward()
    module.zero_grad()
    return kept[0].grad, kept[0].detach()


def test_weights_of_a_node_add_up_to_its_plain_attribution(net):
    ids = torch.tensor([[1, 2, 3]])
    flow = information_flow(net, ids, metric=lambda output: output[0, -1].logsumexp(-1), modules=NODES)
    assert flow.metric == pytest.approx(net._model(ids)[0, -1].logsumexp(-1).item())
    for node in ("embed", "a", "b", "head"):
        gradient, value = attribution_by_hooks(net._model, (ids,), node, lambda output: output[0, -1].logsumexp(-1))
        total = sum(edge.weight for edge in flow.edges if edge.source == node)
        assert total == pytest.approx((gradient * value).sum().item(), rel=1e-4, abs=1e-6), node
    assert {edge.weight for edge in flow.edges if edge.target == "unused"} == {0.0}


def test_weight_of_one_edge_is_the_derivative_along_it(net):
    """Move only what `b` gets of `a`, by a small step, and look at the metric (float64)."""
    module, ids = net._model.double(), torch.tensor([[1, 2, 3]])
    flow = information_flow(net, ids, metric=lambda output: output.square().sum(), modules=NODES)

    def metric(step):
        x = module.embed(ids)
        raw = module.a(x)
        a = raw.tanh()
        b = module.b(module.norm(x + (raw * (1 + step)).tanh()))
        return (module.head((x + a + b) * 2) + module.c(a)).square().sum().item()

    found = next(edge.weight for edge in flow.edges if edge[:2] == ("a", "b"))
    assert found == pytest.approx((metric(1e-5) - metric(-1e-5)) / 2e-5, rel=1e-6)


@pytest.fixture(scope="module")
def model():
    return LanguageModel("nnsight/landmarks", dispatch=True)


CLEAN, CORRUPTED = "The Eiffel Tower is in the city of", "The Prado Museum is in the city of"


def paris(model):
    answers = [model.tokenizer(answer)["input_ids"][0] for answer in (" Paris", " Madrid")]
    return lambda output: output.logits[0, -1, answers[0]] - output.logits[0, -1, answers[1]]


def test_language_model_has_its_stream_in_the_graph(model):
    graph = trace_graph(model, CLEAN)
    parts = [f"transformer.h.{i}.{part}" for i in range(12) for part in ("attn", "mlp")]
    assert graph.nodes == (
        "input",
        "transformer.wte",
        "transformer.wpe",
        *parts,
        "transformer.ln_f",
        "lm_head",
        "output",
    )
    for i, part in enumerate(parts):
        assert graph.feeders(part) == ("transformer.wte", "transformer.wpe", *parts[:i])
    assert graph.feeders("lm_head") == ("transformer.ln_f",)


def test_attribution_patching_of_edges_adds_up_to_that_of_nodes(model):
    metric = paris(model)
    flow = information_flow(model, CLEAN, corrupted=CORRUPTED, metric=metric)
    ids = [torch.tensor([model.tokenizer(prompt)["input_ids"]]) for prompt in (CLEAN, CORRUPTED)]
    for node in ("transformer.wte", "transformer.h.0.mlp", "transformer.h.5.attn", "transformer.h.9.mlp"):
        gradient, clean = attribution_by_hooks(model._model, ids[:1], node, metric)
        _, other = attribution_by_hooks(model._model, ids[1:], node, metric)
        total = sum(edge.weight for edge in flow.edges if edge.source == node)
        assert total == pytest.approx((gradient * (clean - other)).sum().item(), rel=1e-3, abs=1e-3), node
    # What does not differ between the prompts carries nothing.
    assert all(abs(edge.weight) < 1e-6 for edge in flow.edges if edge.source == "transformer.wpe")


def test_modules_of_a_frozen_model(model):
    for parameter in model._model.parameters():
        parameter.requires_grad_(False)
    try:
        graph = trace_graph(model, CLEAN, modules=[model.transformer.h[0], "transformer.h.3"])
    finally:
        for parameter in model._model.parameters():
            parameter.requires_grad_(True)
    assert edges(graph) == {("transformer.h.0", "transformer.h.3"), ("transformer.h.3", "output")}


def test_strongest_and_files_and_pictures(model, tmp_path):
    flow = information_flow(model, CLEAN, corrupted=CORRUPTED, metric=paris(model))
    best = flow.strongest(10)
    least = min(abs(edge.weight) for edge in best.edges)
    assert len(best.edges) == 10
    assert sum(abs(edge.weight) > least for edge in flow.edges) == 9
    assert set(best.nodes) == {name for edge in best.edges for name in edge[:2]}
    flow.save(tmp_path / "flow.json")
    assert ModuleGraph.load(tmp_path / "flow.json") == flow
    figure = best.plot(tmp_path / "flow.html", title="flow")
    assert (tmp_path / "flow.html").read_text().count('"source"') == 10
    assert {text.get_text() for text in figure.axes[0].texts} >= {"output", "lm_head"}
    assert trace_graph(model, CLEAN, modules=["transformer.h.0", "transformer.h.1"]).plot().axes
    assert math.isfinite(flow.metric)


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modules": ["a", "a.b"]}, "has no 'b'"),
        ({"modules": []}, "at least one"),
        ({"metric": lambda output: output}, "tensor of one number"),
        ({"metric": lambda output: 3.0}, "tensor of one number"),
        ({"corrupted": torch.tensor([[1, 2]])}, "the same length"),
    ],
)
def test_what_cannot_be_weighted_is_refused(net, given, message):
    given = {"metric": lambda output: output.sum(), "modules": NODES, **given}
    with pytest.raises(errors.NNsightError, match=message):
        information_flow(net, torch.tensor([[1, 2, 3]]), **given)


def test_nodes_inside_one_another_or_called_twice_are_refused(model):
    with pytest.raises(errors.InputError, match=r"is inside transformer\.h\.0"):
        trace_graph(model, CLEAN, modules=["transformer.h.0", "transformer.h.0.mlp"])
    with pytest.raises(errors.InputError, match="layer is called 2 times"):
        trace_graph(NNsight(Twice()), torch.rand(2, 3))
