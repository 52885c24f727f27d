"""Saturation: where a softmax saturates, its gradient vanishes, and attribution patching with it (Kramár et al. 2024).

Queries of the bundled model are patched from one landmark's prompt into another's. Attribution patching guesses what each
patch does from one gradient. The sharper the attention, the less that gradient says; the average of gradients
along the way (integrated gradients; Hanna et al. 2024) says it still. Values pass later softmaxes only, and hold longer.

    python examples/saturation.py    # prints the correlations, draws saturation.png
"""

import torch

from nnsight import LanguageModel, plots
from nnsight.experiments import activation_patching, attribution_patching, logit_diff

SHARPNESS = (1, 2, 4)
LANDMARKS = {
    "Eiffel Tower": " Paris",
    "Colosseum": " Rome",
    "Rialto Bridge": " Venice",
    "Prado Museum": " Madrid",
    "Atomium": " Brussels",
    "Vigeland Park": " Oslo",
    "Chain Bridge": " Budapest",
    "Parthenon": " Athens",
    "Kremlin": " Moscow",
    "Taj Mahal": " Agra",
    "Space Needle": " Seattle",
    "Malecon": " Havana",
}
CLEAN = [f"The {name} is in the city of" for name in LANDMARKS]
CORRUPTED = CLEAN[1:] + CLEAN[:1]
CITIES = list(LANDMARKS.values())
METRIC = logit_diff(CITIES, CITIES[1:] + CITIES[:1])


def sharpened(model, factor):
    """The same model, with attention of `factor` times the scores."""
    with model.edit() as sharp:
        for heads in model.heads:
            heads.q = heads.q * factor
    return sharp


def correlation(model, site, method):
    """Of what the patches do and what the method says that they do, over layers and prompts."""
    options = {"over": "layer", "direction": "noise", "progress": False}
    real = activation_patching(model, CLEAN, CORRUPTED, METRIC, site, **options)
    guess = attribution_patching(model, CLEAN, CORRUPTED, METRIC, site, method=method, steps=10, **options)
    clean = real.baseline["clean"][:, None]
    effects = torch.stack([(result.values - clean).flatten() for result in (real, guess)])
    return effects.corrcoef()[0, 1].item()


def run():
    """Correlations by case, each a list by sharpness."""
    model = LanguageModel("nnsight/landmarks", dispatch=True)
    cases = {"queries, one gradient": ("head_q", "atp"), "queries, integrated": ("head_q", "ig")}
    cases["values, one gradient"] = ("head_v", "atp")
    return {
        name: [correlation(sharpened(model, factor), *case) for factor in SHARPNESS] for name, case in cases.items()
    }


if __name__ == "__main__":
    found = run()
    for name, values in found.items():
        print(f"{name:24}" + "".join(f"{value:8.2f}" for value in values))
    plots.heatmap(
        list(found.values()),
        rows=list(found),
        columns=[f"sharpness {factor}" for factor in SHARPNESS],
        title="Does the estimate agree with the patch?",
        value_label="correlation",
    ).savefig("saturation.png", dpi=90)
