"""Probes: the least penalized loss, held-out prompts, and controls that fail."""

import numpy
import pytest
import torch

from nnsight import NNsight, errors
from nnsight.experiments import collect_activations, fit_probe


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rows():
    return torch.randn(600, 12, generator=chance()) * torch.linspace(0.1, 30, 12) + 5


def test_ridge_is_the_closed_form(rows):
    labels = rows @ torch.linspace(-1, 1, 12) + torch.randn(600, generator=chance(1))
    probe = fit_probe(rows, labels, kind="linear", l2=0.1)
    order = torch.randperm(600, generator=chance())
    train, test = (part.sort().values.numpy() for part in (order[120:], order[:120]))
    x, y = rows.double().numpy(), labels.double().numpy()
    mean, deviation = x[train].mean(0), x[train].std(0)
    scaled = (x - mean) / deviation
    # The penalty as additional rows of a least squares problem.
    system = numpy.vstack([scaled[train], numpy.sqrt(0.1 * len(train)) * numpy.eye(12)])
    target = numpy.concatenate([y[train] - y[train].mean(), numpy.zeros(12)])
    weight = numpy.linalg.lstsq(system, target, rcond=None)[0]
    found = scaled[test] @ weight + y[train].mean()
    assert numpy.allclose(probe.predict(rows[test]).numpy(), found, atol=1e-3)
    expected = 1 - ((found - y[test]) ** 2).sum() / ((y[test] - y[test].mean()) ** 2).sum()
    assert probe.score == pytest.approx(expected, abs=1e-5)
    assert (probe.train_rows, probe.test_rows) == (480, 120)
    assert probe.control_score < 0.1


def test_logistic_is_where_the_penalized_loss_is_flat(rows):
    labels = (rows[:, 11] > 20).long() + (rows[:, 11] > -10).long()
    probe = fit_probe(rows, labels, l2=0.01)
    train = torch.randperm(600, generator=chance())[120:].sort().values
    x = rows[train].double()
    deviation = x.std(0, correction=0)
    weight = (probe.weight.double() * deviation).requires_grad_()
    bias = probe.bias.double() + probe.weight.double() @ x.mean(0)
    bias.requires_grad_()
    logits = (x - x.mean(0)) / deviation @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, labels[train]) + 0.005 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)
    assert probe.score > 0.8
    assert probe.predict(rows[:5]) == [probe.classes[i] for i in (rows[:5] @ probe.weight.T + probe.bias).argmax(-1)]


def test_control_has_no_more_than_chance_and_selectivity_is_the_difference(rows):
    labels = (rows[:, 2] > 5).long()
    probe = fit_probe(rows, labels)
    assert probe.score > 0.95
    assert abs(probe.control_score - 0.5) < 0.15
    assert probe.selectivity == probe.score - probe.control_score
    assert fit_probe(rows, labels, control=None).selectivity is None


def test_labels_that_are_not_there_are_not_found(rows):
    labels = torch.randint(2, (600,), generator=chance(5))
    probe = fit_probe(rows, labels)
    assert abs(probe.score - 0.5) < 0.15


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    torch.manual_seed(0)
    model = NNsight(torch.nn.Sequential(torch.nn.Embedding(200, 256)))
    tokens = torch.randint(200, (150, 6), generator=chance())
    return collect_activations(model, tokens, "0", to=tmp_path_factory.mktemp("store"), progress=False)


def test_types_as_control_can_be_learnt_by_heart(store):
    """A probe of 256 dimensions tells 200 token types apart, so the control task of Hewitt & Liang shows its capacity."""
    labels = ["even" if token % 2 == 0 else "odd" for token in store["token"].tolist()]
    types, shuffled = (fit_probe(store, labels, control=control) for control in ("types", "shuffled"))
    assert types.classes == ("even", "odd")
    assert types.score > 0.9
    assert types.control_score > 0.9
    assert types.selectivity < 0.1
    assert shuffled.selectivity > 0.3


def test_prompts_are_held_out_as_a_whole(store):
    """Each prompt has a random label and a mark of its own: a probe that saw part of a prompt would know the rest."""
    prompts = store["prompt"]
    marks = torch.nn.functional.one_hot(prompts, 150).float()

    class Marked(type(store)):
        def read(self, name, indices=None):
            return marks if name == self.sites[0] else super().read(name, indices)

    labels = torch.randint(2, (150,), generator=chance(3))
    probe = fit_probe(Marked(store.folder), labels)
    assert probe.train_score == 1
    assert probe.score < 0.75
    assert probe.test_rows == 30 * 6


def test_label_for_each_prompt(store):
    labels = [i % 3 for i in range(150)]
    one = fit_probe(store, labels, control=None)
    other = fit_probe(store, [labels[i] for i in store["prompt"].tolist()], control=None)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], {}, "2 labels do not belong to 600 rows"),
        ([0] * 600, {}, "two different labels"),
        ([0.5] * 600, {}, 'kind="linear"'),
        ([0, 1] * 300, {"held_out": 0.0001}, "nothing to test"),
        ([0, 1] * 300, {"kind": "deep"}, "'deep'"),
        ([0, 1] * 300, {"control": "random"}, "'random'"),
        ([0, 1] * 300, {"control": "types"}, "tokens of a store"),
    ],
)
def test_what_cannot_be_fitted_is_refused(rows, labels, options, message):
    with pytest.raises(errors.InputError, match=message):
        fit_probe(rows, labels, **options)


def test_site_must_be_chosen_among_several(tmp_path):
    model = NNsight(torch.nn.Sequential(torch.nn.Embedding(20, 4), torch.nn.Linear(4, 3)))
    store = collect_activations(model, [[1, 2], [3, 4]], ["0", "1"], to=tmp_path, progress=False)
    with pytest.raises(errors.InputError, match=r"0\.output, 1\.output"):
        fit_probe(store, [0, 1])
