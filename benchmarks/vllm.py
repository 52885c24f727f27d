"""What do blocks cost in a vLLM engine?  Tokens a second of 64 requests at a time.

    .venv-vllm/bin/python benchmarks/vllm.py

A Llama with random weights; plain vLLM and ours side by side, in turns, and transformers' `generate` with the same edit.
`make test-vllm` makes the environment.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time

sys.path = [path for path in sys.path if os.path.abspath(path or ".") != os.path.dirname(os.path.abspath(__file__))]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REQUESTS, PROMPT, TOKENS, LAYER = 64, 32, 32, 3
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 8000,
}
GOALS = {"ours, no blocks": 0.98, "steering as a spec": 0.9, "steering as a block": 0.7}


def make_folder(folder):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from nnsight import LanguageModel

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer = LanguageModel("nnsight/landmarks").tokenizer
    assert isinstance(tokenizer, type(AutoTokenizer.from_pretrained(tokenizer.name_or_path)))
    tokenizer.save_pretrained(folder)
    return torch.randint(3, 1000, (REQUESTS, PROMPT)).tolist(), torch.randn(SIZES["hidden_size"])


def plain(engine, prompts):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def plain_ours(model, prompts):
    found = model.trace(prompts, trace=False, max_tokens=TOKENS, ignore_eos=True)
    return [list(one.outputs[0].token_ids) for one in found]


def with_blocks(model, prompts, vector):
    with model.trace(max_tokens=TOKENS, ignore_eos=True) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                for _ in tracer.iter[:]:
                    model.resid_post[LAYER] += vector


def with_spec(model, prompts, vector):
    from nnsight.experiments import Intervention, InterventionSpec

    spec = InterventionSpec(Intervention(f"resid_post[{LAYER}]", "add", value=vector))
    with model.apply(spec), model.trace(max_tokens=TOKENS, ignore_eos=True) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                pass


def with_reads(model, prompts, vector):
    with model.trace(max_tokens=TOKENS, ignore_eos=True) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                for _ in tracer.iter[:]:
                    model.resid_post[LAYER]


def transformers_generate(module, prompts, vector):
    import torch

    def steer(_module, _args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    handle = module.model.layers[LAYER].register_forward_hook(steer)
    with torch.no_grad():
        module.generate(torch.tensor(prompts), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    handle.remove()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM

    from nnsight.modeling.vllm import VLLM

    with tempfile.TemporaryDirectory() as folder:
        prompts, vector = make_folder(folder)
        options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "enable_prefix_caching": False}
        engine, ours = LLM(folder, **options), VLLM(folder, dispatch=True, **options)
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runs = {
        "plain vLLM": lambda: plain(engine, prompts),
        "ours, no blocks": lambda: plain_ours(ours, prompts),
        "steering as a spec": lambda: with_spec(ours, prompts, vector),
        "steering as a block": lambda: with_blocks(ours, prompts, vector),
        "reads at each step": lambda: with_reads(ours, prompts, vector),
        "transformers generate, steered": lambda: transformers_generate(module, prompts, vector),
    }
    assert runs["plain vLLM"]() == runs["ours, no blocks"]()
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):  # what ran before shows in what runs next
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
    base = seconds["plain vLLM"]
    print(f"{REQUESTS} requests, {PROMPT} + {TOKENS} tokens\n{'':32}{'tokens/s':>10}{'of plain':>10}{'goal':>8}")
    for name, taken in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(base, taken, strict=True))
        goal = f"{GOALS[name]:.2f} {'met' if ratio >= GOALS[name] else 'missed'}" if name in GOALS else ""
        print(f"{name:32}{REQUESTS * TOKENS / statistics.median(taken):10.0f}{ratio:10.2f}  {goal}")
    ours.close()


if __name__ == "__main__":
    main()
