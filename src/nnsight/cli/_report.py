"""What the demo prints and writes: each experiment's numbers, shown in the terminal and returned as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nnsight.plots import heatmap

from ._terminal import Terminal, fit

SHOWN = 5  # predictions
PATCHING = "3  Where the answer is (activation patching)"


class Report:
    """Shows numbers on a terminal, with tokens as text.

    Every method prints one section and returns what goes into the file of numbers.
    """

    def __init__(self, screen: Terminal, tokenizer: Any) -> None:
        self._screen = screen
        self._tokenizer = tokenizer

    def predictions(self, prompt: str, probabilities: Tensor) -> list[dict[str, Any]]:
        """The most probable next tokens."""
        best = probabilities.topk(min(SHOWN, len(probabilities)))
        found = [self._prediction(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        self._screen.heading("1  What comes next")
        self._screen.print(f"   {prompt} …\n")
        for item in found:
            bar = "█" * round(40 * item["probability"])
            self._screen.print(f"   {fit(label(item['token']), 14)} {item['probability']:6.1%}  {bar}")
        return found

    def logit_lens(self, lens: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The most probable token of each layer."""
        found = [
            {"layer": layer, **self._prediction(int(probabilities.argmax()), probabilities.max().item())}
            for layer, probabilities in enumerate(lens)
        ]
        self._screen.heading("2  What each layer would say, read as if it was the last (logit lens)")
        self._screen.print()
        for item in found:
            share = item["probability"]
            cell = self._screen.paint(f" {share:6.1%} ", share)
            self._screen.print(f"   layer {item['layer']:>2}  {fit(label(item['token']), 14)} {cell}")
        return found

    def comparable(self, prompt: str, corrupted: str) -> bool:
        """Whether the prompts have as many tokens; says so where they have not."""
        lengths = [len(self.tokens(text)) for text in (prompt, corrupted)]
        if lengths[0] == lengths[1]:
            return True
        self._screen.heading(PATCHING)
        self._screen.print(
            f"   Left out: the prompt has {lengths[0]} tokens and the corrupted prompt {lengths[1]}.\n"
            "   A patch goes from a position to the same position: give two prompts of equal length."
        )
        return False

    def patching(
        self,
        prompt: str,
        corrupted: str,
        answer: int,
        clean: float,
        baseline: float,
        values: list[list[float]],
    ) -> dict[str, Any]:
        """The sweep over layers and positions."""
        screen, token = self._screen, self._tokenizer.decode([answer])
        columns, theirs = self.tokens(prompt), self.tokens(corrupted)
        screen.heading(PATCHING)
        screen.print(
            f"   Into a run on “{corrupted} …”, one hidden state is copied from the run on\n"
            f"   “{prompt} …”. How probable does that make “{label(token)}”, in per cent?\n"
            f"   Without a patch {baseline:.1%}; on the prompt itself {clean:.1%}.\n"
        )
        lines = [
            [label(text) for text in columns],
            [label(text) if text != other else "" for text, other in zip(theirs, columns, strict=True)],
        ]
        names = [f"   layer {layer:>2}" for layer in range(len(values))]
        for line in screen.grid(values, names, lines, scale=max(clean, baseline)):
            screen.print(line)
        return {
            "answer": token,
            "clean_probability": clean,
            "corrupted_probability": baseline,
            "tokens": columns,
            "corrupted_tokens": theirs,
            "values": values,
        }

    def files(self, numbers: dict[str, Any], out: Path) -> None:
        """Write the numbers, and a figure of the sweep where there was one."""
        self._screen.heading("4  Files")
        path = out / "demo.json"
        path.write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", "utf-8")
        self._screen.print(f"   {path}")
        if "patching" in numbers:
            try:
                draw(numbers, out / "patching.png")
                self._screen.print(f"   {out / 'patching.png'}")
            except ImportError as error:
                self._screen.print(f"   No figure: {error}")

    def tokens(self, text: str) -> list[str]:
        """The tokens of a prompt, as text."""
        return [self._tokenizer.decode([token]) for token in self._tokenizer(text)["input_ids"]]

    def _prediction(self, token: int, probability: float) -> dict[str, Any]:
        return {"token": self._tokenizer.decode([token]), "probability": probability}


def draw(numbers: dict[str, Any], path: Path) -> None:
    """The sweep as a picture."""
    sweep = numbers["patching"]
    pairs = zip(sweep["tokens"], sweep["corrupted_tokens"], strict=True)
    heatmap(
        sweep["values"],
        rows=[f"layer {layer}" for layer in range(len(sweep["values"]))],
        columns=[label(own) if own == other else f"{label(own)}\n({label(other)})" for own, other in pairs],
        title=f"Patching “{numbers['prompt']}”\ninto “{numbers['corrupted']}”, one hidden state at a time",
        value_label=f"probability of “{label(sweep['answer'])}”",
        path=path,
    )


def label(token: str) -> str:
    """A token as it is shown: without the space before a word, and printable."""
    shown = token.strip() or token.replace(" ", "␣")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown)
