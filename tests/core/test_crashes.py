"""Errors of PyTorch's C++ code in the body and in the model are ordinary exceptions, every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"

PROGRAM = '''
import collections, gc, json, random
import greenlet, torch
from nnsight import NNsight

torch.set_num_threads(1)
random.seed(1)
ERRORS, WARM = 10_000, 2_000


class Net(torch.nn.Module):
    """`depth` and `through_c` say how deep in the stack the layer is called, and by way of what."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.layer = torch.nn.Linear(4, 4)
        self.last = torch.nn.Linear(4, 2)

    def forward(self, ids, depth, through_c):
        return self.last(deeply(depth, through_c, lambda: self.layer(self.embed(ids))))


def deeply(depth, through_c, function):
    if depth == 0:
        return function()
    if through_c:
        found = []
        sorted([0], key=lambda _: found.append(deeply(depth - 1, through_c, function)) or 0)
        return found[0]
    return deeply(depth - 1, through_c, function)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def body_matmul(model, ids, elsewhere, depth, through_c):
    with model.trace(ids, depth, through_c):
        elsewhere(lambda: model.embed.output)
        hidden = model.layer.output
        elsewhere(lambda: hidden @ torch.ones(3, 3))


def body_stack(model, ids, elsewhere, depth, through_c):
    with model.trace(ids, depth, through_c):
        embedded = model.embed.output
        elsewhere(lambda: torch.stack([embedded, model.layer.output[0]]))


def model_input(model, ids, elsewhere, depth, through_c):
    with model.trace(ids, depth, through_c):
        elsewhere(lambda: model.embed.output)
        model.layer.input = torch.ones(2, 3)


def model_output(model, ids, elsewhere, depth, through_c):
    with model.trace(ids, depth, through_c):
        model.layer.output = torch.ones(3)
        elsewhere(lambda: model.output)


def model_ids(model, ids, elsewhere, depth, through_c):
    with model.trace(ids + 7, depth, through_c):
        elsewhere(lambda: model.embed.input)
        elsewhere(lambda: elsewhere(lambda: model.last.output))


CASES = [
    (body_matmul, RuntimeError),
    (model_input, RuntimeError),
    (body_stack, RuntimeError),
    (model_output, RuntimeError),
    (model_ids, IndexError),
]
model = NNsight(Net())
ids = torch.tensor([1, 2])
seen = collections.Counter()
for number in range(ERRORS):
    case, expected = CASES[number % len(CASES)]
    open_at, body_at, model_at = random.choices(range(41), k=3)
    through_c = random.random() < 0.5

    def elsewhere(function):
        return deeply(body_at, not through_c, function)

    try:
        deeply(open_at, through_c, lambda: case(model, ids, elsewhere, model_at, through_c))
    except expected as error:
        assert type(error) is expected, error
        seen[case.__name__] += 1
    if number == WARM:
        gc.collect()
        warm = resident()
gc.collect()
grown = resident() - warm
alive = [found for found in gc.get_objects() if issubclass(type(found), greenlet.greenlet) and not found.dead]
others = [found for found in alive if found is not greenlet.getcurrent()]
with model.trace(ids, 3, True):
    after = model.last.output.save()
print(json.dumps({
    "seen": seen,
    "grown": grown,
    "greenlets": len(others),
    "works": torch.equal(after, model._model(ids, 0, False)),
}))
'''


def test_ten_thousand_errors_of_pytorch_are_ordinary_exceptions():
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["seen"] == dict.fromkeys(
        ["body_matmul", "body_stack", "model_input", "model_output", "model_ids"], 2_000
    )
    assert found["grown"] < 10e6
    assert found["greenlets"] == 0
    assert found["works"]
