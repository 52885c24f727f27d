"""Sites, and the names of TransformerLens."""

import pytest
import torch

from nnsight import LanguageModel, NNsight
from nnsight.errors import InputError, NamesError, UnknownPathError
from nnsight.names import Site

from .cases import BY_NAME, CASES, Case, build, close, inputs, wrap

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def model():
    return LanguageModel(build(BY_NAME["gpt2"]))


class TestSite:
    def test_reads_and_writes(self, model) -> None:
        site = model.site("head_z", -2)
        with model.trace(IDS):
            z = site.read()
            assert torch.equal(z, model.heads[1].z)
            site.write(z * 2)
            changed = model.logits
        with model.trace(IDS):
            model.heads[1].z *= 2
            assert torch.equal(changed, model.logits)

    def test_is_a_value_itself(self, model) -> None:
        site = model.site("resid_pre", 1)
        assert site == model.site("resid_pre", -2) == model.get("blocks.1.hook_resid_pre")
        assert site != model.site("resid_pre", 0)
        assert {site: 3}[model.site("resid_pre", 1)] == 3
        assert repr(site) == "Site('resid_pre', 1)"
        assert (site.name, site.layer, site.stack) == ("resid_pre", 1, "")
        assert site.axes == ("batch", "pos", "d_model")
        assert site.path == "model.transformer.h.1.input"
        assert site.module is model.transformer.h[1]
        assert model.site("head_pattern", 1).axes == ("batch", "head", "query", "key")
        assert model.site("logits").axes == ("batch", "pos", "vocab")
        assert model.site("neurons", 1).path == "model.transformer.h.1.mlp.c_proj.input"
        assert model.site("head_pattern", 1).path == "model.transformer.h.1.attn.pattern"
        assert model.site("head_result", 1).path == "model.transformer.h.1.attn.c_proj.result"
        assert model.site("logits").path == "model.output.logits"

    def test_short_names_of_heads(self, model) -> None:
        for name in "q k v z pattern result".split():
            assert model.site(name, 1) == model.site(f"head_{name}", 1)

    def test_whole_values(self, model) -> None:
        sites = [model.site(name) for name in ("embed", "final_norm", "logits")]
        with model.trace(IDS):
            found = [site.read() for site in sites]
        with model.trace(IDS):
            assert torch.equal(found[0], model.embed.output)
            assert torch.equal(found[1], model.final_norm.output)
            assert torch.equal(found[2], model.logits)
        assert sites[0].path == "model.transformer.wte.output"

    def test_errors(self, model) -> None:
        with pytest.raises(NamesError, match="vocabulary has no 'resid'"):
            model.site("resid", 1)
        with pytest.raises(NamesError, match="a value of each layer"):
            model.site("resid_pre")
        with pytest.raises(NamesError, match="once, not at a layer"):
            model.site("logits", 1)
        for kind in (NamesError, IndexError):
            with pytest.raises(kind, match=r"transformer\.h has 3 layers; there is none at index 7: they are 0 to 2"):
                model.site("resid_pre", 7)
        for layer in ("1", 1.0, slice(0, 2)):
            with pytest.raises(InputError, match="named by its number, 0 to 2"):
                model.site("resid_pre", layer)
        with pytest.raises(NamesError, match="no stack 'decoder'"):
            model.site("resid_pre", 1, stack="decoder")
        with pytest.raises(NamesError, match="has no head_z at layer 0"):
            NNsight(build(BY_NAME["jamba"])).site("head_z", 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_order_is_that_of_the_model(case: Case) -> None:
    """Every value of the model in one trace, sorted, without a second pass; and each is what it is alone."""
    model, names, _ = wrap(case)
    sites = []
    for index in range(len(names)):
        for name in names.names():
            try:
                sites.append(model.site(name, index, stack=case.stack))
            except NamesError:
                continue
    for name in ("embed", "final_norm", "logits"):
        try:
            sites.append(model.site(name, stack=case.stack))
        except NamesError:
            continue
    given, found = inputs(case), {}
    assert len(sites) > 8
    with model.trace(**given, strict_order=True):
        for site in sorted(sites, key=lambda site: site.order):
            found[site] = site.read().clone()
    for site in sites[:: max(1, len(sites) // 7)]:
        with model.trace(**given):
            alone = site.read().clone()
        assert close(found[site], alone, 1e-5), site
        assert len(site.axes) == alone.dim()


HOOKS = {
    "blocks.1.hook_resid_pre": ("resid_pre", 1),
    "blocks.1.hook_resid_mid": ("resid_mid", 1),
    "blocks.1.hook_resid_post": ("resid_post", 1),
    "blocks.1.hook_attn_out": ("attn_out", 1),
    "blocks.1.hook_mlp_out": ("mlp_out", 1),
    "blocks.1.attn.hook_q": ("head_q", 1),
    "blocks.1.attn.hook_k": ("head_k", 1),
    "blocks.1.attn.hook_v": ("head_v", 1),
    "blocks.1.attn.hook_z": ("head_z", 1),
    "blocks.1.attn.hook_pattern": ("head_pattern", 1),
    "blocks.1.attn.hook_result": ("head_result", 1),
    "blocks.1.mlp.hook_post": ("neurons", 1),
    "model.blocks.-1.hook_resid_pre": ("resid_pre", -1),
    "hook_embed": ("embed",),
    "ln_final.hook_normalized": ("final_norm",),
}


class TestHooks:
    @pytest.mark.parametrize("hook", HOOKS)
    def test_served(self, model, hook: str) -> None:
        assert model.get(hook) == model.site(*HOOKS[hook])
        with model.trace(IDS):
            assert torch.equal(model.get(hook).read(), model.site(*HOOKS[hook]).read())

    def test_rotated(self, model) -> None:
        llama = LanguageModel(build(BY_NAME["llama"]))
        assert llama.get("blocks.0.attn.hook_rot_q") == llama.site("head_q_rot", 0)
        with pytest.raises(NamesError, match="no rotary embedding"):
            model.get("blocks.0.attn.hook_rot_k")

    @pytest.mark.parametrize(
        ("hook", "reason"),
        [
            ("blocks.0.attn.hook_attn_scores", "scores before the softmax"),
            ("blocks.0.hook_q_input", "edit resid_pre or resid_mid"),
            ("blocks.0.mlp.hook_pre", "differs by family"),
            ("hook_pos_embed", "few families have"),
            ("ln_final.hook_scale", "scale is no value"),
            ("blocks.0.ln1.hook_normalized", "There is no hook blocks.0.ln1.hook_normalized. There are: hook_embed"),
        ],
    )
    def test_refused_by_name(self, model, hook: str, reason: str) -> None:
        with pytest.raises(NamesError, match=reason):
            model.get(hook)

    def test_paths_are_still_modules(self, model) -> None:
        assert model.get("transformer.h.1").path == "model.transformer.h.1"
        with pytest.raises(UnknownPathError):
            model.get("transformer.i.1")


def test_sites_of_two_halves_sort_by_half() -> None:
    model, _, _ = wrap(BY_NAME["bart-encoder"])
    sites = [model.site("resid_pre", 0, stack="decoder"), model.site("resid_post", 2, stack="encoder")]
    assert [site.stack for site in sorted(sites)] == ["encoder", "decoder"]
    assert repr(sites[0]) == "Site('resid_pre', 0, stack='decoder')"
    assert isinstance(sites[0], Site)
