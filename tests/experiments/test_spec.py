"""Interventions as data: each operation does what a plain hook does on the single, unpadded prompt."""

import json

import pytest
import torch

from nnsight import LanguageModel, NNsight, errors
from nnsight.experiments import Intervention, InterventionSpec

PROMPTS = [
    "The Eiffel Tower is in the city of",
    "The Colosseum is in the city of",
    "The Great Wall of China is in the country of",
]
OTHER = "The Louvre Museum is in the city of"
WIDTH, HEADS = 128, 4


@pytest.fixture(scope="module")
def model():
    return LanguageModel("nnsight/landmarks", dispatch=True)


def vector(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooked(model, prompt, path, change, *, inputs=False, steps=0):
    """Logits `[seq, vocab]` of one prompt alone, or the ids generated, with `change(x, step)` at a module."""
    module, calls = model._model.get_submodule(path), []

    def on_output(_module, _args, output):
        calls.append(1)
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        new = change(tensor.clone(), len(calls) - 1)
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    def on_input(_module, args):
        calls.append(1)
        return (change(args[0].clone(), len(calls) - 1), *args[1:])

    handle = module.register_forward_pre_hook(on_input) if inputs else module.register_forward_hook(on_output)
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    with handle, torch.no_grad():
        if steps:
            return model._model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)[0]
        return model._model(ids).logits[0]


def applied(model, spec, prompts=PROMPTS):
    """Logits of each prompt's own tokens, from one padded batch."""
    with torch.no_grad(), model.apply(spec), model.trace(prompts):
        logits = model.output.logits.save()
    lengths = [len(model.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return [row[-length:] for row, length in zip(logits, lengths, strict=True)]


def stream_of(model, prompt, path, *, inputs=False):
    found = []
    hooked(model, prompt, path, lambda x, _: found.append(x.clone()) or x, inputs=inputs)
    return found[0][0]


def check(model, intervention, path, change, *, inputs=False):
    """`change(x, row)` on `[1, seq, d]` is what the intervention does to row `row`."""
    found = applied(model, InterventionSpec(intervention))
    plain = applied_plainly(model)
    differs = False
    for row, prompt in enumerate(PROMPTS):
        expected = hooked(model, prompt, path, lambda x, _, row=row: change(x, row), inputs=inputs)
        torch.testing.assert_close(found[row], expected, atol=3e-4, rtol=1e-4)
        differs |= not torch.allclose(expected, plain[row], atol=2e-3)
    assert differs  # else the change shows nothing


def applied_plainly(model):
    return [hooked(model, prompt, "transformer.h.0", lambda x, _: x) for prompt in PROMPTS]


V = vector(0, WIDTH) * 3
U = vector(1, 2, WIDTH)
BASIS = torch.linalg.qr(U.T)[0]
OPERATIONS = {
    "set": ({"value": V}, lambda x: V.expand_as(x)),
    "mean": ({"value": V}, lambda x: V.expand_as(x)),
    "add": ({"value": V, "factor": -2.0}, lambda x: x - 2 * V),
    "trained": ({"value": V}, lambda x: x + V),
    "scale": ({"factor": 0.25}, lambda x: x / 4),
    "zero": ({}, torch.zeros_like),
    "project_out": ({"value": U}, lambda x: x - x @ BASIS @ BASIS.T),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("site", "path"), [("resid_post[4]", "transformer.h.4"), ("transformer.h.4", "transformer.h.4")]
)
def test_operation_everywhere(model, name, site, path):
    options, change = OPERATIONS[name]
    check(model, Intervention(site, name, **options), path, lambda x, _: change(x))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("positions", [[-1], [1, -2], "last", [3, 0]], ids=str)
def test_operation_at_positions_of_each_prompt(model, name, positions):
    options, change = OPERATIONS[name]
    numbers = [-1] if positions == "last" else positions

    def at(x, _row):
        x[:, numbers] = change(x[:, numbers])
        return x

    check(model, Intervention("mlp_out[3]", name, positions=positions, **options), "transformer.h.3.mlp", at)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("positions", ["all", [2]], ids=str)
def test_operation_in_some_rows(model, name, positions):
    options, change = OPERATIONS[name]

    def at(x, row):
        if row != 1:
            place = slice(None) if positions == "all" else positions
            x[:, place] = change(x[:, place])
        return x

    spec = Intervention("transformer.h.3.mlp", name, rows=[0, 2], positions=positions, **options)
    check(model, spec, "transformer.h.3.mlp", at)


@pytest.mark.parametrize("name", [*set(OPERATIONS) - {"project_out"}, "project_out"])
@pytest.mark.parametrize("shape", ["head", "heads"])
def test_operation_on_heads(model, name, shape):
    options, _ = OPERATIONS[name]
    size = WIDTH // HEADS
    options = dict(options)
    value = None
    if "value" in options:
        value = vector(2, size) if shape == "head" or name == "project_out" else vector(2, HEADS, size)
        options["value"] = value
    unit = None if value is None or value.dim() > 1 else (value / value.norm())[:, None]

    def one(x, head):
        v = value[head] if value is not None and value.dim() == 2 else value
        return {
            "set": lambda: v.expand_as(x),
            "mean": lambda: v.expand_as(x),
            "add": lambda: x - 2 * v,
            "trained": lambda: x + v,
            "scale": lambda: x / 4,
            "zero": lambda: x * 0,
            "project_out": lambda: x - x @ unit @ unit.T,
        }[name]()

    def at(x, _row):
        for head in (1, 3):
            part = slice(head * size, (head + 1) * size)
            x[:, -2:, part] = one(x[:, -2:, part], head)
        return x

    spec = Intervention("head_z[7]", name, heads=[1, 3], positions=[-1, -2], **options)
    check(model, spec, "transformer.h.7.attn.c_proj", at, inputs=True)


@pytest.mark.parametrize("positions", [[2], [1, -1], "last"], ids=str)
def test_swap_puts_in_what_another_prompt_has(model, positions):
    other = stream_of(model, OTHER, "transformer.h.1")
    numbers = [-1] if positions == "last" else positions

    def at(x, _row):
        x[0, numbers] = other[numbers]
        return x

    check(model, Intervention("resid_post[1]", "swap", prompt=OTHER, positions=positions), "transformer.h.1", at)


def test_swap_of_all_positions_needs_as_many(model):
    spec = InterventionSpec(Intervention("resid_post[1]", "swap", prompt=model.tokenizer(OTHER)["input_ids"]))
    ids = torch.tensor([model.tokenizer(OTHER)["input_ids"][::-1]])
    with torch.no_grad(), model.apply(spec), model.trace(ids):
        stream = model.resid_post[1].save()
    assert torch.allclose(stream[0], stream_of(model, OTHER, "transformer.h.1"), atol=1e-4)
    with pytest.raises(errors.InputError, match="tokens, and none at position"):
        applied(model, spec, ["The Louvre"])


def test_value_for_each_position(model):
    values = vector(3, 2, WIDTH)

    def at(x, _row):
        x[0, 3], x[0, -1] = values[0], values[1]
        return x

    check(model, Intervention("resid_post[4]", "set", value=values, positions=[3, -1]), "transformer.h.4", at)


def test_pattern_of_some_heads(model):
    spec = InterventionSpec(Intervention("head_pattern[2]", "zero", heads=[0], positions=[-1]))
    with torch.no_grad(), model.apply(spec), model.trace(PROMPTS[0]):
        z = model.heads[2].z.save()
    with torch.no_grad(), model.trace(PROMPTS[0]):
        plain = model.heads[2].z.save()
    assert z[:, -1, 0].abs().max() == 0
    assert torch.allclose(z[:, -1, 1:], plain[:, -1, 1:], atol=1e-5)
    assert torch.allclose(z[:, :-1], plain[:, :-1], atol=1e-5)


def test_several_at_one_place_act_in_their_order(model):
    spec = InterventionSpec(
        Intervention("mlp_out[9]", "zero"),
        Intervention("mlp_out[3]", "scale", factor=2.0),
        Intervention("mlp_out[3]", "add", value=V),
    )
    with torch.no_grad(), model.apply(spec), model.trace(PROMPTS[0]):
        third, ninth = model.mlp_out[3].save(), model.mlp_out[9].save()
    with torch.no_grad(), model.trace(PROMPTS[0]):
        plain = model.mlp_out[3].save()
    assert torch.allclose(third, 2 * plain + V, atol=1e-5)
    assert ninth.abs().max() == 0


# --- generation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({}, lambda x, step, n: slice(None)),
        ({"positions": [1, -1]}, lambda x, step, n: [1, n - 1] if x.shape[1] > 1 else []),
        ({"steps": [0, 2]}, lambda x, step, n: slice(None) if step in (0, 2) else []),
        ({"positions": "last"}, lambda x, step, n: [-1]),
    ],
    ids=["all", "of the prompt", "at some steps", "last"],
)
def test_generation(model, options, at, cached):
    value = vector(4, WIDTH) * 8
    spec = InterventionSpec(Intervention("resid_post[4]", "add", value=value, **options))
    ids = model.tokenizer(PROMPTS[0])["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": cached}
    with model.apply(spec), model.generate(PROMPTS[0], **options):
        found = model.generator.output.save()

    calls = []

    def add(_module, _args, output):
        calls.append(1)
        output = output.clone()
        output[:, at(output, len(calls) - 1, len(ids))] += value
        return output

    with torch.no_grad(), model._model.transformer.h[4].register_forward_hook(add):
        expected = model._model.generate(torch.tensor([ids]), **options)
        plain = len(calls)
    assert plain == 4
    assert found.tolist() == expected.tolist()


def test_generation_of_a_padded_batch_is_that_of_single_prompts(model):
    spec = InterventionSpec(Intervention("resid_post[4]", "set", value=V * 4, positions=[2]))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with model.apply(spec), model.generate(PROMPTS, **options):
        found = model.generator.output.save()

    def at(x, step):
        if not step:
            x[:, 2] = V * 4
        return x

    for row, prompt in zip(found, PROMPTS, strict=True):
        assert row[-3:].tolist() == hooked(model, prompt, "transformer.h.4", at, steps=3)[-3:].tolist()


# --- models ----------------------------------------------------------------------------------------------


def logits_of(model):
    with torch.no_grad(), model.trace(PROMPTS[0]):
        return model.output.logits.save()


def test_apply_ends_with_its_block_and_edit_stays(model):
    spec = InterventionSpec(Intervention("mlp_out[2]", "zero"))
    plain = logits_of(model)
    context = model.apply(spec)
    for _ in range(2):
        with context as same:
            assert same is model
            inside = logits_of(model)
        assert torch.equal(logits_of(model), plain)
    assert not torch.equal(inside, plain)
    with pytest.raises(RuntimeError, match="mine"), model.apply(spec):
        raise RuntimeError("mine")
    assert torch.equal(logits_of(model), plain)
    edited = model.edit(spec)
    assert torch.equal(logits_of(edited), inside)
    assert torch.equal(logits_of(model), plain)
    assert model.edit(spec, inplace=True) is model
    assert torch.equal(logits_of(model), inside)
    model.clear_edits()
    assert torch.equal(logits_of(model), plain)


def test_apply_inside_a_trace_is_refused(model):
    spec = InterventionSpec(Intervention("mlp_out[2]", "zero"))
    swap = InterventionSpec(Intervention("mlp_out[2]", "swap", prompt=OTHER, positions="last"))
    ready = model.apply(spec)
    for use in (lambda: model.apply(swap), lambda: model.edit(spec), ready.__enter__):
        with pytest.raises(errors.InputError, match=r"Put (it|them) outside"), model.trace(PROMPTS[0]):
            use()


def test_apply_of_a_function_is_that_of_the_module():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    seen = []
    wrapped = NNsight(net)
    assert wrapped.apply(seen.append) is wrapped
    assert seen == [net[0], net[1], net]


def test_invokes_are_rows_of_the_batch(model):
    spec = InterventionSpec(Intervention("resid_post[4]", "set", value=V, rows=[1], positions=[-1]))
    with model.apply(spec), model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            first = model.resid_post[4].save()
        with tracer.invoke(PROMPTS[1]):
            second = model.resid_post[4].save()
    assert torch.equal(second[0, -1], V)
    assert not torch.equal(first[0, -1], V)


def test_trained_vector_gets_the_gradient_of_plain_autograd(model):
    for site in ("resid_post[4]", "transformer.h.4"):
        value = (V / 10).clone().requires_grad_()
        spec = InterventionSpec(Intervention(site, "trained", value=value, factor=2.0, positions=[-1]))
        with model.apply(spec), model.trace(PROMPTS[0]):
            loss = model.output.logits[0, -1].logsumexp(-1)
        (found,) = torch.autograd.grad(loss, spec.parameters())
        plain = (V / 10).clone().requires_grad_()

        def add(_module, _args, output, plain=plain):
            output = output.clone()
            output[:, -1] += 2 * plain
            return output

        ids = torch.tensor([model.tokenizer(PROMPTS[0])["input_ids"]])
        with model._model.transformer.h[4].register_forward_hook(add):
            (expected,) = torch.autograd.grad(model._model(ids).logits[0, -1].logsumexp(-1), [plain])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_plain_module_with_tokens():
    net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
    model, ids = NNsight(net), torch.tensor([[1, 2, 3], [4, 5, 6]])
    spec = InterventionSpec(Intervention("0", "zero", rows=[1], positions=[0]))
    with torch.no_grad(), model.apply(spec), model.trace(ids):
        output = model.output.save()
    hidden = net[0](ids).detach()
    hidden[1, 0] = 0
    assert torch.equal(output, net[1](hidden).detach())


# --- files -----------------------------------------------------------------------------------------------


def full_spec():
    return InterventionSpec(
        Intervention("resid_post[4]", "add", value=V, factor=0.5, positions=[1, -1], rows=[0], steps=[0, 1]),
        Intervention("head_z[2]", "scale", factor=3, heads=[1]),
        Intervention("transformer.h.1.mlp", "swap", prompt=OTHER, positions="last"),
        Intervention("mlp_out[5]", "trained", value=vector(7, WIDTH).requires_grad_()),
        Intervention("mlp_out[6]", "project_out", value=U.to(torch.bfloat16)),
        name="a name",
        model="nnsight/landmarks",
    )


def test_file_has_everything(model, tmp_path):
    spec = full_spec()
    spec.save(tmp_path / "spec")
    loaded = InterventionSpec.load(tmp_path / "spec")
    assert (loaded.name, loaded.model, len(loaded)) == ("a name", "nnsight/landmarks", 5)
    for one, other in zip(spec, loaded, strict=True):
        assert repr(one) == repr(other)
        assert (one.value is None) == (other.value is None)
        if one.value is not None:
            assert one.value.dtype == other.value.dtype
            assert torch.equal(one.value, other.value)
    assert loaded[3].value.requires_grad
    found, expected = applied(model, loaded), applied(model, spec)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    text = json.loads((tmp_path / "spec" / "interventions.json").read_text())
    assert (text["kind"], text["format"]) == ("nnsight.interventions", 1)
    assert sorted(path.name for path in (tmp_path / "spec").iterdir()) == ["interventions.json", "values.safetensors"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "{", "damaged"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2"),
        (lambda text: text.replace("nnsight.interventions", "other"), "no InterventionSpec"),
        (lambda text: text.replace('"operation": "scale"', '"operation": "explode"'), "no operation 'explode'"),
        (lambda text: text.replace("0.value", "9.value"), "damaged"),
        (lambda text: text.replace('"heads"', '"hearts"'), "hearts"),
    ],
)
def test_damaged_file_is_refused(tmp_path, damage, message):
    full_spec().save(tmp_path)
    path = tmp_path / "interventions.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(errors.LoadError, match=message):
        InterventionSpec.load(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(errors.LoadError, match=r"no interventions\.json"):
        InterventionSpec.load(tmp_path)
    with pytest.raises(errors.LoadError, match="neither a folder nor a repository"):
        InterventionSpec.load("nobody/nothing")


def test_hub_gets_the_files(monkeypatch):
    """The upload alone is replaced; what reaches it is what would be sent."""
    import huggingface_hub

    sent = {}

    def upload(self, **options):
        folder = options.pop("folder_path")
        sent.update(options, loaded=InterventionSpec.load(folder), token=self.token)
        return "https://hub/someone/spec"

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **options: sent.update(repo=name, made=options)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    address = full_spec().push_to_hub("someone/spec", token="t", private=True, commit_message="m")
    assert address == "https://hub/someone/spec"
    assert (sent["repo"], sent["made"], sent["repo_id"]) == (
        "someone/spec",
        {"private": True, "exist_ok": True},
        "someone/spec",
    )
    assert (sent["token"], sent["commit_message"]) == ("t", "m")
    assert repr(sent["loaded"].interventions) == repr(full_spec().interventions)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("x", "explode"), "no operation 'explode'"),
        ((3, "zero"), "site is a name"),
        (("x", "set"), "needs value="),
        (("x", "scale"), "needs factor="),
        (("x", "swap"), "needs prompt="),
        (("x", "zero", V), "no use for value="),
        (("x", "set", V, 2.0), "no use for factor="),
        (("x", "set", torch.tensor([1])), "floating-point"),
        (("x", "set", torch.tensor(1.0)), "with a dimension"),
        (("x", "set", torch.tensor([float("nan")])), "not finite"),
        (("x", "project_out", torch.zeros(4)), "length 0"),
        (("x", "scale", None, "2"), "factor is a number"),
        (("x", "swap", None, None, []), "text or token ids"),
    ],
)
def test_intervention_that_makes_no_sense(given, message):
    with pytest.raises(errors.InputError, match=message):
        Intervention(*given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positions": "first"}, "'first'"),
        ({"positions": [1.5]}, "different whole numbers"),
        ({"positions": [1, 1]}, "different whole numbers"),
        ({"positions": []}, "at least one"),
        ({"rows": [-1]}, "counted from 0"),
        ({"heads": [True]}, "different whole numbers"),
    ],
)
def test_places_that_make_no_sense(given, message):
    with pytest.raises(errors.InputError, match=message):
        Intervention("mlp_out[2]", "zero", **given)


@pytest.mark.parametrize(
    ("intervention", "error", "message"),
    [
        (Intervention("mlp_out[2]", "zero", heads=[0]), errors.InputError, "has no heads"),
        (Intervention("mlp_out[99]", "zero"), IndexError, "99"),
        (Intervention("transformer.h.2.nothing", "zero"), errors.UnknownPathError, "nothing"),
        (Intervention("mlp_out[2]", "swap", prompt="Hi", positions=[40]), errors.InputError, "none at position 40"),
        (Intervention("head_pattern[2]", "swap", prompt="Hi"), errors.InputError, "swap is of places"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_at_once(model, intervention, error, message):
    with pytest.raises(error, match=message):
        model.apply(InterventionSpec(intervention))


@pytest.mark.parametrize(
    ("intervention", "error", "message"),
    [
        (Intervention("mlp_out[2]", "set", value=torch.ones(5)), errors.InputError, r"is \[5\]; there it is \[128\]"),
        (Intervention("mlp_out[2]", "project_out", value=torch.ones(5)), errors.InputError, r"is \[128\], not \[5\]"),
        (Intervention("mlp_out[2]", "zero", rows=[3]), errors.InputError, "3 rows; there is no row 3"),
        (Intervention("head_z[2]", "zero", heads=[4]), errors.InputError, "4 heads; there is no head 4"),
        (Intervention("mlp_out[2]", "zero", positions=[-20]), errors.InputError, "row 0 has 10 tokens"),
        (Intervention("transformer.wpe.input", "zero"), errors.RowsError, "cannot be told apart"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(model, intervention, error, message):
    with pytest.raises(error, match=message):
        applied(model, InterventionSpec(intervention))


def test_spec_of_nothing():
    for given in ((), (3,)):
        with pytest.raises(errors.InputError, match="made of Interventions"):
            InterventionSpec(*given)
