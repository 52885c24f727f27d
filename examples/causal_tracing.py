"""Causal tracing: where a model keeps a fact, found by restoring parts of a run that was spoilt (Meng et al. 2022, ROME).

The bundled model knows capitals. Noise on the country's token spoils "The capital of France is"; then states of the clean run
are put back, a few at a time. Early, the country's token suffices, and most of that is the MLPs' work there; late, the last
token does, which attention has brought the answer to. States of another country's run restore nothing.

    python examples/causal_tracing.py    # prints the effects, draws causal_tracing.png
"""

import torch

from nnsight import LanguageModel, plots

COUNTRIES = """France Italy England Scotland Ireland Germany Spain Portugal Belgium Denmark Norway Sweden Finland Iceland
Austria Switzerland Czechia Hungary Poland Greece Russia Ukraine Romania Bulgaria Serbia Croatia Estonia Latvia China
Japan Thailand Vietnam Indonesia Iran Iraq Nepal Egypt Morocco Kenya Senegal Tunisia Ghana Nigeria Canada Cuba Peru Chile
Brazil Colombia Ecuador Australia""".split()
PROMPTS = [f"The capital of {country} is" for country in COUNTRIES]
SUBJECT, LAST = 3, 4  # each country is one token
PLACES = {"subject": SUBJECT, "last": LAST}
WINDOW = 5  # layers of MLPs or attentions that are restored together
NOISE = 3  # standard deviations of the embeddings


def spoil(model):
    """The same model, with noise on the subject."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(PROMPTS), model.config.n_embd, generator=generator) * NOISE * model.embed.weight.std()
    with model.edit() as spoilt:
        model.embed.output[:, SUBJECT] += noise
    return spoilt


def restored(spoilt, states, sites, position, answers):
    """The answer's probability, with the clean states of these sites at one position."""
    with spoilt.trace(PROMPTS):
        for site in sites:
            spoilt.site(*site).read()[:, position] = states[site][:, position]
        logits = spoilt.logits[:, -1].save()
    return probability(logits, answers)


def probability(logits, answers):
    return logits.softmax(-1).gather(1, answers[:, None]).mean().item()


@torch.no_grad()
def run():
    """The answer's probability: `clean`, `spoilt`, and restored by what and where, a list by layer."""
    model = LanguageModel("nnsight/landmarks", dispatch=True)
    layers = range(model.config.n_layer)
    states = {}
    with model.trace(PROMPTS):
        for layer in layers:
            for name in ("attn_out", "mlp_out", "resid_post"):
                states[name, layer] = model.site(name, layer).read().clone()
        clean = model.logits[:, -1].save()
    answers = clean.argmax(-1)
    others = {site: state.roll(1, 0) for site, state in states.items()}

    spoilt = spoil(model)
    found = {"clean": probability(clean, answers), "spoilt": restored(spoilt, states, [], LAST, answers)}
    cases = {"state": ("resid_post", 1, states), "MLPs": ("mlp_out", WINDOW, states)}
    cases |= {"attention": ("attn_out", WINDOW, states), "another's state": ("resid_post", 1, others)}
    for what, (name, width, source) in cases.items():
        for where, position in PLACES.items():
            windows = [[(name, layer) for layer in layers if abs(layer - middle) <= width // 2] for middle in layers]
            found[f"{what}, {where}"] = [restored(spoilt, source, window, position, answers) for window in windows]
    return found


if __name__ == "__main__":
    found = run()
    effects = {name: values for name, values in found.items() if isinstance(values, list)}
    print(f"probability of the answer: clean {found['clean']:.2f}, spoilt {found['spoilt']:.2f}")
    for name, values in effects.items():
        print(f"{name:26}" + "".join(f"{value:6.2f}" for value in values))
    plots.heatmap(
        list(effects.values()),
        rows=list(effects),
        columns=[str(layer) for layer in range(len(effects["state, last"]))],
        title="What brings the answer back, by layer",
        value_label="probability of the answer",
    ).savefig("causal_tracing.png", dpi=90)
