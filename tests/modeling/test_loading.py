"""Models by name, folder and revision, with the options of transformers; modules as they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import Module

from nnsight import LanguageModel, NNsight, TransformersModel
from nnsight.errors import InputError, LoadError

from . import small

IDS = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]])
CLASSES = [LanguageModel, TransformersModel]


def llama(dtype: torch.dtype = torch.float32) -> Module:
    return small.lively(tf.LlamaForCausalLM(tf.LlamaConfig(**small.TEXT, num_key_value_heads=2))).to(dtype)


def save(net: Module, folder: Path) -> str:
    net.save_pretrained(folder)  # type: ignore[operator]
    small.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(llama(), tmp_path_factory.mktemp("llama"))


def logits_of(net: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(IDS).logits


def traced(model: Any) -> torch.Tensor:
    with torch.no_grad(), model.trace(IDS):
        return model.output.logits.save()


# --- folders and the hub's cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_a_local_folder(kind: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits_of(llama())
    model = kind(folder)
    assert not model.dispatched
    assert all(parameter.is_meta for parameter in model._model.parameters())
    layer = model.model.layers[1]
    assert torch.equal(traced(model), expected)
    assert model.dispatched
    assert layer._module is model._model.model.layers[1]
    monkeypatch.chdir(Path(folder).parent)
    assert torch.equal(traced(kind(f"./{Path(folder).name}", dispatch=True)), expected)


@pytest.fixture
def revisions(hub_cache: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The logits of each revision of `someone/model`: `main`, a branch and the commits they stand for."""
    repository, expected = hub_cache / "models--someone--model", {}
    for number, name in enumerate(("main", "older")):
        commit = str(number + 2) * 40
        snapshot = repository / "snapshots" / commit
        net = llama()
        with torch.no_grad():
            net.lm_head.weight.mul_(number + 1)
        if not snapshot.exists():
            snapshot.parent.mkdir(parents=True, exist_ok=True)
            save(net, snapshot)
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / name).write_text(commit)
        expected[name] = expected[commit] = logits_of(net)
    return expected


def test_revisions(revisions: dict[str, torch.Tensor]) -> None:
    assert not torch.equal(revisions["main"], revisions["older"])
    assert torch.equal(traced(LanguageModel("someone/model")), revisions["main"])
    for name, expected in revisions.items():
        model = LanguageModel("someone/model", revision=name)
        assert torch.equal(traced(model), expected)
        assert model.tokenizer("red").input_ids == [small.WORDS.index("red")]
    with pytest.raises(LoadError, match="local cache"):
        LanguageModel("someone/model", revision="newer")


def test_names_that_are_not_there(tmp_path: Path) -> None:
    for name, reason in (
        ("someone/nothing", "local cache"),
        (str(tmp_path / "nothing"), "no such folder"),
        ("nnsight/nothing", "nnsight/landmarks"),
        (str(tmp_path), "could not be loaded"),
    ):
        for kind in CLASSES:
            with pytest.raises(LoadError, match=reason):
                kind(name)


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16"])
def test_dtype(folder: str, given: Any) -> None:
    model = LanguageModel(folder, dtype=given)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(traced(model), logits_of(tf.LlamaForCausalLM.from_pretrained(folder, dtype=given)))
    with model.trace(IDS):
        assert model.model.layers[0].output.dtype == torch.bfloat16
    with model.scan(IDS):
        assert model.model.layers[0].output.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"dtype": None}], ids=str)
def test_the_dtype_that_was_saved(tmp_path: Path, options: dict[str, Any]) -> None:
    path = save(llama(torch.bfloat16), tmp_path)
    model = LanguageModel(path, **options)
    with model.scan(IDS):
        before = model.model.layers[0].output.dtype
    plain = tf.LlamaForCausalLM.from_pretrained(path, **options)
    assert before == plain.lm_head.weight.dtype == model.dispatch().lm_head.weight.dtype
    assert torch.equal(traced(model), logits_of(plain))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attn_implementation(folder: str, attention: str) -> None:
    model = LanguageModel(folder, attn_implementation=attention)
    plain = tf.LlamaForCausalLM.from_pretrained(folder, attn_implementation=attention)
    for _ in range(2):
        assert model._model.config._attn_implementation == attention
        model.dispatch()
    assert torch.equal(traced(model), logits_of(plain))
    with torch.no_grad(), model.trace(IDS):
        pattern = model.heads[1].pattern.clone()
    eager = tf.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(pattern, eager(IDS, output_attentions=True).attentions[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float13"}, "float13"),
        ({"attn_implementation": "nonsense"}, "nonsense"),
        ({"no_such_option": 3}, "no_such_option"),
    ],
    ids=str,
)
def test_options_that_transformers_refuses(folder: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(LoadError, match=f"with these options.*{reason}"):
        LanguageModel(folder, dispatch=True, **options)


def test_options_of_loading_with_a_module() -> None:
    for options in ({"dtype": torch.bfloat16}, {"device_map": "auto"}, {"revision": "main"}):
        for kind in CLASSES:
            with pytest.raises(InputError, match=f"{next(iter(options))}=… is about loading"):
                kind(llama(), **options)
    with pytest.raises(InputError, match="task=… is about loading"):
        TransformersModel(small.bert(), task="fill-mask")


# --- code that a model brings -----------------------------------------------------------------------------------


@pytest.fixture
def custom(tmp_path: Path) -> str:
    """A folder with a model whose class lies in it."""
    path = save(llama(), tmp_path / "custom")
    file = tmp_path / "custom" / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "own_kind", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    file.write_text(json.dumps(config))
    (tmp_path / "custom" / "own.py").write_text(OWN)
    return path


OWN = """
import pathlib
import transformers

pathlib.Path(__file__).with_name("ran").touch()

class OwnConfig(transformers.LlamaConfig):
    model_type = "own_kind"

class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}], ids=str)
def test_code_is_not_run_unasked(
    custom: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    modules = Path(tf.utils.hub.HF_MODULES_CACHE)
    before = set(modules.rglob("ran"))
    for kind in CLASSES:
        with pytest.raises(LoadError, match="trust_remote_code=True, revision="):
            kind(custom, **options)
    assert set(modules.rglob("ran")) == before


def test_code_that_is_trusted(custom: str) -> None:
    model = LanguageModel(custom, trust_remote_code=True)
    assert type(model._model).__name__ == "OwnModel"
    assert not model.dispatched
    assert torch.equal(traced(model), logits_of(llama()))


# --- modules as they stand --------------------------------------------------------------------------------------


class TestTrainMode:
    """A module that trains is wrapped, and left, in training mode."""

    def net(self) -> Module:
        config = tf.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=22, bos_token_id=1, eos_token_id=2)
        return small.lively(tf.GPT2LMHeadModel(config)).train()

    @pytest.mark.parametrize("kind", [NNsight, *CLASSES])
    def test_dropout_drops_as_in_the_plain_call(self, kind: Any) -> None:
        net = self.net()
        model = kind(net)
        for seed in range(2):
            torch.manual_seed(seed)
            expected = net(IDS).logits
            torch.manual_seed(seed)
            with model.trace(IDS):
                dropped = model.transformer.drop.output.save()
                logits = model.output.logits.save()
            assert torch.equal(logits, expected)
            assert bool((dropped == 0).any())
        assert all(module.training for module in net.modules())

    def test_a_step_of_training_through_a_trace(self) -> None:
        net, twin = self.net(), self.net()
        twin.load_state_dict(net.state_dict())
        for module, wrapped in ((net, None), (twin, LanguageModel(twin))):
            optimizer = torch.optim.SGD(module.parameters(), 0.1)
            torch.manual_seed(0)
            if wrapped is None:
                module(IDS, labels=IDS).loss.backward()
            else:
                with wrapped.trace(IDS, labels=IDS):
                    loss = wrapped.output.loss.save()
                loss.backward()
            optimizer.step()
        for one, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_a_second_pass_repeats_the_dropout(self) -> None:
        model = LanguageModel(self.net())
        with model.trace(IDS):
            logits = model.output.logits.save()
            with pytest.warns(match="second"):
                early = model.transformer.h[0].output.clone()
        model._model.eval()
        with model.trace(IDS):
            assert not torch.equal(model.transformer.h[0].output, early)
        assert logits.shape == (2, 4, 22)

    def test_what_is_loaded_by_name_does_not_train(self, folder: str) -> None:
        model = LanguageModel(folder)
        assert not any(module.training for module in model._model.modules())
        assert not any(module.training for module in model.dispatch()._model.modules())
