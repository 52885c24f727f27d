"""Distributed alignment search finds a planted subspace, and its exchange is that of plain hooks."""

import pytest
import torch

from nnsight import NNsight, errors
from nnsight.experiments import fit_das

WIDTH, CLASSES = 24, 4


class Planted(torch.nn.Module):
    """Answers with the class that the last token's embedding has in two hidden directions; the rest is noise."""

    def __init__(self):
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=chance))[0]
        self.basis = basis[:, :2]
        angles = torch.arange(40) % CLASSES * (2 * torch.pi / CLASSES)
        code = torch.stack([angles.cos(), angles.sin()], 1)
        noise = torch.randn(40, WIDTH - 2, generator=chance)
        self.embed = torch.nn.Embedding(40, WIDTH)
        self.read = torch.nn.Linear(WIDTH, CLASSES, bias=False)
        corners = torch.arange(CLASSES) * (2 * torch.pi / CLASSES)
        with torch.no_grad():
            self.embed.weight.copy_(code @ self.basis.T * 1.0 + noise @ basis[:, 2:].T)
            self.read.weight.copy_(torch.stack([corners.cos(), corners.sin()], 1) @ self.basis.T * 8)

    def forward(self, ids):
        return self.read(self.embed(ids))


@pytest.fixture(scope="module")
def planted():
    return NNsight(Planted())


def pairs(count, seed=1):
    base, source = torch.randint(40, (2, count, 3), generator=torch.Generator().manual_seed(seed))
    return base.tolist(), source.tolist(), (source[:, -1] % CLASSES).tolist()


def test_planted_subspace_is_found(planted):
    before = {name: value.clone() for name, value in planted._model.state_dict().items()}
    found = fit_das(planted, *pairs(160), "embed", dim=2, steps=150, progress=False)
    overlap = torch.linalg.svdvals(found.basis.T @ planted._model.basis)
    assert overlap.min() > 0.97
    assert found.accuracy > 0.95
    assert found.full_accuracy == 1
    assert found.control_accuracy < 0.6
    assert found.losses[-1] < found.losses[0] / 2
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(2), atol=1e-5, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in planted._model.state_dict().items())
    assert all(parameter.grad is None for parameter in planted._model.parameters())


def test_one_dimension_is_not_enough_for_four_classes(planted):
    found = fit_das(planted, *pairs(160), "embed", dim=1, steps=100, progress=False)
    assert found.accuracy < 0.8


def test_accuracy_is_that_of_plain_hooks(planted):
    base, source, answers = pairs(40)
    found = fit_das(planted, base, source, answers, "embed", dim=2, steps=5, held_out=0.5, seed=4, progress=False)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4)).tolist()[:20]
    module, right = planted._model, 0
    for i in order:
        with torch.no_grad():
            values = module.embed(torch.tensor([source[i]]))

            def put(_module, _args, output, values=values):
                output = output.clone()
                part = found.basis @ found.basis.T
                output[0, -1] += part @ (values[0, -1] - output[0, -1])
                return output

            with module.embed.register_forward_hook(put):
                right += int(module(torch.tensor([base[i]]))[0, -1].argmax()) == answers[i]
    assert found.accuracy == right / 20


def test_prompts_of_different_lengths(planted):
    base, source, answers = pairs(30)
    base = [row[i % 3 :] for i, row in enumerate(base)]
    found = fit_das(planted, base, source, answers, "embed", dim=WIDTH, steps=1, progress=False)
    assert found.accuracy == found.full_accuracy == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 0}, "from the end"),
        ({"position": -4}, "no position -4"),
        ({"answers": [1]}, "30, 30 and 1"),
        ({"dim": 25}, "from 1 to 24"),
    ],
)
def test_what_cannot_be_searched_is_refused(planted, change, message):
    base, source, answers = pairs(30)
    given = {"base": base, "source": source, "answers": answers, "site": "embed", "progress": False, **change}
    with pytest.raises(errors.InputError, match=message):
        fit_das(planted, **given)
