"""What the documents' snippets take for granted (`model`, Llama's names), and the oracle of the tests."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Module

REVISION = "0" * 40
LLAMAS = ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B")

Edit = Callable[[torch.Tensor], torch.Tensor]


class Seen:
    """What every watched module got and returned, call by call; copies, so later edits do not reach them."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Any]] = defaultdict(list)
        self.outputs: dict[str, list[Any]] = defaultdict(list)

    def __getitem__(self, path: str) -> torch.Tensor:
        """What the module at `path` returned the last time."""
        return self.outputs[path][-1]

    @property
    def logits(self) -> torch.Tensor:
        return self["lm_head"]


class Plain:
    """A wrapped model used without nnsight: forward hooks, autograd, and `generate` of the module itself."""

    def __init__(self, model: Any) -> None:
        self.module: Module = model.dispatch()._model
        self.tokenizer = model.tokenizer

    def encode(self, *prompts: str) -> dict[str, torch.Tensor]:
        """Ids, mask and, where one prompt is shorter, positions `[batch, seq]`, padded on the left."""
        rows = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        size = max(map(len, rows))
        pad = self.module.config.eos_token_id
        ids = torch.tensor([[pad] * (size - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows])
        batch = {"input_ids": ids, "attention_mask": mask}
        if not mask.all():
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return batch

    def length(self, prompt: str) -> int:
        return len(self.tokenizer(prompt)["input_ids"])

    def run(self, *prompts: str, edits: Mapping[str, Edit] | None = None) -> Seen:
        """One forward of the prompts as a batch, with `edits` made to the outputs of modules."""
        with torch.no_grad(), self.edited(edits or {}), self.watching() as seen:
            self.module(**self.encode(*prompts))
        return seen

    def graph(self, prompt: str, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of the module at `path` and the logits computed from it, in one autograd graph."""
        kept: list[torch.Tensor] = []
        module = self.module.get_submodule(path)
        handle = module.register_forward_hook(lambda _m, _i, output: kept.append(first(output)))
        try:
            with torch.enable_grad():
                logits = self.module(**self.encode(prompt)).logits
        finally:
            handle.remove()
        return kept[0], logits

    def generate(
        self, prompt: str, edits: Mapping[str, Edit] | None = None, **options: Any
    ) -> tuple[torch.Tensor, Seen]:
        """The ids `[batch, seq]` that the module's own `generate` gives, and what its modules saw."""
        with self.edited(edits or {}), self.watching() as seen:
            ids = self.module.generate(**self.encode(prompt), **options)
        return ids, seen

    def patterns(self, prompt: str) -> tuple[torch.Tensor, ...]:
        """Each layer's attention probabilities `[batch, head, query, key]`, by eager attention."""
        eager = copy.deepcopy(self.module)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            return eager(**self.encode(prompt), output_attentions=True).attentions

    @contextmanager
    def edited(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Replace the (first) output of each module by what its function makes of a copy."""

        def hook(edit: Edit) -> Callable[..., Any]:
            def change(_module: Module, _inputs: Any, output: Any) -> Any:
                changed = edit(first(output).clone())
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return change

        modules = {path: self.module.get_submodule(path) for path in edits}
        handles = [modules[path].register_forward_hook(hook(edit)) for path, edit in edits.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watching(self, *paths: str) -> Iterator[Seen]:
        """Record the modules at `paths` (all, where none is named) while something runs them."""
        seen = Seen()

        def hook(path: str) -> Callable[..., None]:
            def record(_module: Module, args: Any, kwargs: Any, output: Any) -> None:
                given = (*args, *kwargs.values())
                seen.inputs[path].append(copied(given[0]) if given else None)
                seen.outputs[path].append(copied(first(output)))

            return record

        modules = dict(self.module.named_modules())
        paths = paths or tuple(modules)
        handles = [modules[path].register_forward_hook(hook(path), with_kwargs=True) for path in paths]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def first(output: Any) -> Any:
    """The tensor that matters in what a module returns: the first of a tuple, the logits of a model."""
    if isinstance(output, tuple):
        return output[0]
    return getattr(output, "logits", output)


def copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run faster on one core than threads start."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def plain() -> type[Plain]:
    return Plain


@pytest.fixture
def model(gpt2: Any) -> Iterator[Any]:
    """GPT-2, loaded; found as it was left: no hooks, no replaced methods."""
    yield gpt2.dispatch()
    for path, module in gpt2._model.named_modules():
        assert not module._forward_hooks, path
        assert not module._forward_pre_hooks, path
        assert "forward" not in vars(module), path


@pytest.fixture
def endless(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """GPT-2 that has no last token, so that a generation is as long as it may be."""
    monkeypatch.setattr(model._model.generation_config, "eos_token_id", None)
    return model


@pytest.fixture(scope="session")
def llama(hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 48 small layers in the hub cache, under the names the documents use."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in LLAMAS:
        repository = hub_cache / f"models--{name.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "snapshots" / REVISION).symlink_to(folder, target_is_directory=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
    return folder


@pytest.fixture(scope="session")
def remote_server(llama: Path, start_server: Callable[..., Any]) -> Any:
    """A server of the names that the documents run remotely."""
    return start_server("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "--trusted")


@pytest.fixture
def server(remote_server: Any, keys: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings for that server; nothing may be loaded in this process."""
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "HOST", remote_server.host)
    remote_server.wait_for("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-70B")
    return remote_server


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings for remote execution, put back afterwards."""
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    monkeypatch.setenv("NDIF_API_KEY", "")
