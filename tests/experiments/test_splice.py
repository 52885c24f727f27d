"""Dictionaries spliced into a model, against plain hooks."""

import pytest
import torch

from nnsight import errors
from nnsight.experiments import splice


class Autoencoder(torch.nn.Module):
    def __init__(self, width=32, features=48, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up = torch.nn.Parameter(torch.randn(width, features, generator=generator) * 0.2)
        self.down = torch.nn.Parameter(torch.randn(features, width, generator=generator) * 0.2)

    def encode(self, value):
        return (value @ self.up).relu()

    def decode(self, features):
        return features @ self.down


def run(spliced, ids):
    with spliced.model.trace(ids[None]):
        return spliced.model.logits.save()


def half(features):
    return features * (torch.arange(features.shape[-1]) % 2)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("change", [None, half])
def test_autoencoder(model, plain, ids, site, error, change):
    coder = Autoencoder()

    def replaced(value):
        features = coder.encode(value)
        new = coder.decode(features if change is None else change(features))
        return new + (value - coder.decode(features)) if error else new

    with torch.no_grad():
        expected, untouched = plain(ids[None], {(site, 1): replaced}), plain(ids[None])
        with splice(model, coder, 1, site, error=error, change=change) as spliced:
            found = run(spliced, ids)
            plain(ids[None], reads=[(site, 1)])
            features = coder.encode(plain.values[site, 1])
            torch.testing.assert_close(spliced.features, features if change is None else change(features))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found, untouched, atol=1e-4) == (error and change is None)


@pytest.mark.parametrize("error", [False, True])
def test_transcoder(model, plain, ids, error):
    coder = Autoencoder(seed=1)
    with torch.no_grad():
        plain(ids[None], reads=[("resid_mid", 1)])
        given = plain.values["resid_mid", 1]
        features = coder.encode(given)

        def replaced(value):
            return coder.decode(half(features)) + (value - coder.decode(features) if error else 0)

        expected = plain(ids[None], {("mlp_out", 1): replaced})
        spliced = splice(model, coder, 1, "mlp_out", source="resid_mid", error=error, change=half)
        torch.testing.assert_close(run(spliced, ids), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_features(model, plain, ids, diff):
    coder = Autoencoder()
    with splice(model, coder, 1) as spliced:
        logits = run(spliced, ids)
        found = torch.autograd.grad(diff(logits).sum(), spliced.features)[0]
    with torch.no_grad():
        plain(ids[None], reads=[("resid_post", 1)])
        value = plain.values["resid_post", 1]
    features = coder.encode(value).detach().requires_grad_()
    missing = (value - coder.decode(features)).detach()
    logits = plain(ids[None], {("resid_post", 1): lambda _: coder.decode(features) + missing})
    torch.testing.assert_close(found, torch.autograd.grad(diff(logits).sum(), features)[0], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_spliced_is_refused(model, ids):
    with pytest.raises(errors.InputError, match="has not"):
        splice(model, torch.nn.Linear(3, 3), 1)
    with pytest.raises(errors.InputError, match="comes after"):
        splice(model, Autoencoder(), 1, "attn_out", source="mlp_out")
    with pytest.raises(errors.InputError, match=r"gives \[1, 6, 32\]"):
        wrong = splice(model, Autoencoder(), 1, "head_z", source="resid_pre")
        run(wrong, ids)
