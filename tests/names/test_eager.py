"""The mask that the eager function is given, made from those that other attention functions are given."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from nnsight.errors import NamesError
from nnsight.names._eager import attend_eagerly, eager_mask


class Attention(nn.Module):
    def __init__(self, implementation="sdpa", causal=True):
        super().__init__()
        self.is_causal = causal
        self.config = type("Config", (), {"_attn_implementation": implementation})


def allowed(mask, queries=4, keys=4):
    """Which keys each query sees, of one head of one row."""
    if mask is None:
        return torch.ones(queries, keys, dtype=torch.bool)
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    return (mask == 0).expand(1, mask.shape[1], queries, keys)[0, 0]


def mask_for(attention, mask=None, queries=4, keys=4, **options):
    q, k = torch.zeros(1, 2, queries, 8), torch.zeros(1, 1, keys, 8)
    return eager_mask(attention, q, k, mask, options)


def grid(rule, queries=4, keys=4):
    return torch.tensor([[rule(q, k) for k in range(keys)] for q in range(queries)])


def test_no_mask_means_causal_where_the_attention_is() -> None:
    assert torch.equal(allowed(mask_for(Attention())), grid(lambda q, k: k <= q))
    assert mask_for(Attention(causal=False)) is None
    assert mask_for(Attention(), is_causal=False) is None
    assert torch.equal(allowed(mask_for(Attention(causal=False), is_causal=True)), grid(lambda q, k: k <= q))


def test_one_query_sees_every_key() -> None:
    assert mask_for(Attention(), queries=1) is None


def test_an_empty_static_cache_is_counted_from_the_first_key() -> None:
    assert torch.equal(allowed(mask_for(Attention(), keys=6), keys=6), grid(lambda q, k: k <= q, keys=6))


def test_boolean_and_additive_masks() -> None:
    given = torch.tensor([[True, False], [True, True]])[None, None]
    assert torch.equal(allowed(mask_for(Attention(), given, 2, 2), 2, 2), given[0, 0])
    added = torch.zeros(1, 1, 2, 2)
    assert mask_for(Attention(), added, 2, 2) is added


def test_flash_attention_masks_by_itself() -> None:
    flash = Attention("flash_attention_2")
    assert torch.equal(allowed(mask_for(flash, keys=6), keys=6), grid(lambda q, k: k <= q + 2, keys=6))
    window = mask_for(flash, sliding_window=2)
    assert torch.equal(allowed(window), grid(lambda q, k: q - 2 < k <= q))
    both = mask_for(Attention("flash_attention_2", causal=False), sliding_window=2)
    assert torch.equal(allowed(both), grid(lambda q, k: abs(q - k) < 2))
    last = mask_for(flash, queries=1, keys=5, sliding_window=3)
    assert torch.equal(allowed(last, 1, 5), grid(lambda q, k: k >= 2, 1, 5))
    padding = torch.tensor([[0, 1, 1, 1]])
    assert torch.equal(allowed(mask_for(flash, padding)), grid(lambda q, k: 1 <= k <= q))


def test_other_implementations_are_given_the_window_as_a_mask() -> None:
    assert torch.equal(allowed(mask_for(Attention(), sliding_window=2)), grid(lambda q, k: k <= q))


def test_block_masks() -> None:
    block = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < 2), 1, 1, 4, 4, device="cpu")
    assert torch.equal(allowed(mask_for(Attention("flex_attention"), block)), grid(lambda q, k: q - 2 < k <= q))


def test_packed_sequences_are_refused() -> None:
    with pytest.raises(NamesError, match="packed into one row"):
        mask_for(Attention("flash_attention_2"), cu_seq_lens_q=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"mask": "bool"}, {"mask": "float"}]
)
def test_the_kernel_with_its_probabilities(options) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 6)
    options = dict(options)
    if options.get("enable_gqa"):
        k, v = k[:, :2], v[:, :2]
    kind = options.pop("mask", None)
    if kind is not None:
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        options["attn_mask"] = mask if kind == "bool" else torch.randn(2, 4, 5, 5)
    seen = []
    ours = attend_eagerly(lambda weights, function, **_: seen.append(weights) or weights, q, k, v, **options)
    assert torch.allclose(ours, nn.functional.scaled_dot_product_attention(q, k, v, **options), atol=1e-5)
    assert torch.allclose(seen[0].sum(-1), torch.ones(2, 4, 5))
