"""The tuned lens, against a fit by plain autograd."""

import torch

from nnsight.experiments import TunedLens, logit_lens, tuned_lens

from .test_lens import read_stream, streams


def test_a_fit_is_a_fit_by_plain_autograd(model, plain, pairs):
    found = TunedLens.fit(model, pairs[0], steps=5, rate=0.01, progress=False)
    layers = streams(plain, pairs[0])
    target = read_stream(plain, layers[-1]).log().detach()
    for layer, stream in enumerate(layers[:2]):
        weight, bias = torch.zeros(32, 32, requires_grad=True), torch.zeros(32, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=0.01)
        for step in range(5):
            predicted = read_stream(plain, stream + stream @ weight + bias).log()
            loss = (target.exp() * (target - predicted)).sum(-1).mean()
            torch.testing.assert_close(found.loss[step, layer], loss.detach(), rtol=1e-3, atol=1e-5)
            weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            optimizer.step()
        torch.testing.assert_close(found.weights[layer], weight.detach(), rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(found.biases[layer], bias.detach(), rtol=1e-2, atol=1e-4)
    assert (found.loss[-1, :2] < found.loss[0, :2]).all()
    assert not found.weights[2].any()  # the last stream is the model's own
    assert not found.loss[:, 2].any()


def test_parameters_of_the_model_get_no_gradient(model, plain, pairs):
    TunedLens.fit(model, pairs[0], steps=1, progress=False)
    assert all(parameter.grad is None for parameter in plain.module.parameters())


def test_a_lens_reads_what_it_translates(model, plain, pairs):
    lens = TunedLens.fit(model, pairs[0], steps=5, rate=0.01, progress=False)
    found = tuned_lens(model, pairs[1], lens, 9, progress=False)
    for layer, stream in enumerate(streams(plain, pairs[1])):
        expected = read_stream(plain, stream + stream @ lens.weights[layer] + lens.biases[layer])[..., 9]
        torch.testing.assert_close(found.values[:, layer], expected.detach(), rtol=1e-4, atol=1e-5)
    assert (found.values - logit_lens(model, pairs[1], 9, progress=False).values).abs().max() > 1e-3


def test_save_and_load(model, pairs, tmp_path):
    lens = TunedLens.fit(model, pairs[0], steps=1, progress=False)
    lens.save(tmp_path / "lens.safetensors")
    again = TunedLens.load(tmp_path / "lens.safetensors")
    assert torch.equal(again.weights, lens.weights)
    assert torch.equal(again.biases, lens.biases)
    assert torch.equal(again.loss, lens.loss)


def test_padding_is_not_learnt_from(model, pairs):
    first = TunedLens.fit(model, [pairs[0, 0], pairs[0, 1, :3]], steps=1, progress=False)
    alone = [TunedLens.fit(model, ids, steps=1, progress=False) for ids in (pairs[0, 0], pairs[0, 1, :3])]
    expected = (6 * alone[0].loss + 3 * alone[1].loss) / 9  # the average over tokens
    torch.testing.assert_close(first.loss, expected, rtol=1e-3, atol=1e-5)
