"""Small models in real vLLM engines, beside the same models in transformers.

Run by `make test-vllm`, in an environment of its own: vLLM pins other releases than the rest of the suite uses.
"""

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LANDMARKS = Path(__file__).parents[2] / "src/nnsight/_bundled/landmarks"
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}
NAMES = ("gpt2", *CONFIGS)
MARK = "<!-- written by `make vllm-table`, from what ran -->"


TABLE = os.environ.get("NNSIGHT_VLLM_TABLE")  # a file to write what was shown to
_shown: dict[tuple[str, str], set[str]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    family = getattr(item, "callspec", None) and item.callspec.params.get("pair")
    if TABLE and family and report.when in ("setup", "call") and not (report.when == "setup" and report.passed):
        cell = "error" if item.path.name == "test_refused.py" else "supported"
        feature = item.originalname.removeprefix("test_").replace("_", " ")
        _shown.setdefault((feature, family), set()).add(cell if report.passed else "DIFFERENT")


def pytest_sessionfinish():
    if not _shown:
        return
    rows = [f"| | {' | '.join(NAMES)} |", f"|---|{'---|' * len(NAMES)}"]
    for feature in dict.fromkeys(feature for feature, _ in _shown):
        cells = [" ".join(sorted(_shown.get((feature, name), {"missing"}))) for name in NAMES]
        rows.append(f"| {feature} | {' | '.join(cells)} |")
    path = Path(TABLE)
    head, _, _ = path.read_text("utf-8").partition(MARK)
    path.write_text(head + MARK + "\n\n" + "\n".join(rows) + "\n", "utf-8")


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vLLM has an environment of its own: make test-vllm")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of each model; that of GPT-2 is the trained one that ships with the package."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(LANDMARKS)
    found = {"gpt2": str(LANDMARKS)}
    for name, (config, more) in CONFIGS.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        made = getattr(transformers, config)(**SIZES, vocab_size=len(tokenizer), initializer_range=0.2, **more)
        transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = str(folder)
    return found


class Pair:
    """One model twice: in an engine, and in transformers."""

    def __init__(self, name: str, folder: str, **options) -> None:
        from nnsight import LanguageModel
        from nnsight.modeling.vllm import VLLM

        self.name = name
        self.engine = VLLM(folder, dispatch=True, dtype="float32", max_model_len=128, **options)
        self.plain = LanguageModel(folder, dtype=torch.float32, dispatch=True)

    def close(self) -> None:
        self.engine.close()
        gc.collect()


@pytest.fixture(scope="session")
def engines(folders):
    """The engine that is asked for; one lives at a time."""
    living: dict[tuple, Pair] = {}

    def start(name: str, **options) -> Pair:
        key = (name, *sorted(options.items()))
        if key not in living:
            for pair in living.values():
                pair.close()
            living.clear()
            living[key] = Pair(name, folders[name], **options)
        return living[key]

    yield start
    for pair in living.values():
        pair.close()


@pytest.fixture(params=NAMES, scope="session")
def pair(engines, request):
    return engines(request.param)


@pytest.fixture
def gpt2(engines):
    return engines("gpt2")
