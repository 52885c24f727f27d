"""Progress bars of long calls."""

import pytest

from nnsight.experiments import (
    TunedLens,
    ablate,
    activation_patching,
    attribution_patching,
    logit_diff,
    logit_lens,
    path_patching,
)

METRIC = logit_diff(5, 7)
CALLS = {
    "activation_patching": lambda model, a, b, **options: activation_patching(model, a, b, METRIC, **options),
    "attribution_patching": lambda model, a, b, **options: attribution_patching(
        model, a, b, METRIC, method="ig", steps=2, **options
    ),
    "path_patching": lambda model, a, b, **options: path_patching(model, a, b, METRIC, **options),
    "ablate": lambda model, a, b, **options: ablate(model, a, METRIC, mode="zero", **options),
    "logit_lens": lambda model, a, b, **options: logit_lens(model, a, **options),
    "tuned_lens": lambda model, a, b, **options: TunedLens.fit(model, a, steps=2, **options),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bar_is_shown_unless_it_is_not_wanted(model, ids, other_ids, capfd, name):
    CALLS[name](model, ids, other_ids)
    assert "%|" in capfd.readouterr().err
    CALLS[name](model, ids, other_ids, progress=False)
    assert capfd.readouterr().err == ""


def test_the_bar_counts_every_run(model, pairs, monkeypatch):
    from nnsight.experiments import _sweep

    seen = []

    class Bar:
        def __init__(self, total, title, shown):
            seen.append([total, 0])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            seen[-1][1] += count

    monkeypatch.setattr(_sweep, "progress_bar", Bar)
    activation_patching(model, *pairs, METRIC, memory="400KB")
    assert seen == [[3 * 6 * 3, 3 * 6 * 3]]
