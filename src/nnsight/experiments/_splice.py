"""splice: a dictionary of features (sparse autoencoder, transcoder) in the place of a model's value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nnsight import LanguageModel, errors


class Dictionary(Protocol):
    """What can be spliced in: a sparse autoencoder or transcoder of any library."""

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """The features `[…, feature]` of a value `[…, d]`."""
        ...

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """The value `[…, d]` of features."""
        ...


@dataclass(eq=False)
class _Seen:
    """What a run leaves, which comes back from where it ran."""

    features: torch.Tensor | None = field(default=None, metadata={"travels": "back"})


@dataclass(eq=False)
class Spliced:
    """A model with a dictionary in it, as a context; made by `splice`."""

    _model: LanguageModel
    _seen: _Seen

    @property
    def model(self) -> LanguageModel:
        """The model with the dictionary in it, which shares the weights of the one without."""
        return self._model

    @property
    def features(self) -> torch.Tensor | None:
        """The features `[batch, pos, feature]` of the last run, after `change`; None where there was none."""
        return self._seen.features

    def __enter__(self) -> Spliced:
        return self

    def __exit__(self, *_error: object) -> None:
        self._seen.features = None


def splice(
    model: LanguageModel,
    dictionary: Dictionary,
    layer: int,
    site: str = "resid_post",
    *,
    source: str | None = None,
    error: bool = True,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Spliced:
    """Let a dictionary's reconstruction stand in the place of a value (Bricken et al. 2023, Marks et al. 2024).

    With the error term, what the dictionary leaves of the value is added back, so that nothing changes but what `change`
    does to the features.

    Example:
        >>> import torch
        >>> from nnsight import LanguageModel
        >>> from nnsight.experiments import splice
        >>> class Dictionary(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.directions = torch.nn.Parameter(torch.eye(128))
        ...     def encode(self, value):
        ...         return (value @ self.directions.T).relu()
        ...     def decode(self, features):
        ...         return features @ self.directions
        >>> model = LanguageModel("nnsight/landmarks")
        >>> with splice(model, Dictionary(), layer=6) as spliced:
        ...     with spliced.model.trace("The Eiffel Tower is in the city of"):
        ...         logits = spliced.model.logits.save()
        ...     features = spliced.features
        >>> features.shape[-1], model.tokenizer.decode(logits[0, -1].argmax())
        (128, ' Paris')

    Args:
        model: The model.
        dictionary: Has `encode` and `decode`.
        layer: At which layer, from the last one where negative.
        site: The value that is replaced.
        source: The value that is encoded, where it is another one (of the same layer, before `site`): with `source="resid_mid"`
            and `site="mlp_out"`, a transcoder (Dunefsky et al. 2024) stands for the MLP, if it has the norm in it.
        error: Whether to add the error term.
        change: From features to features, to be used instead: `lambda features: features * mask`.

    Returns:
        A context whose `model` has the dictionary in it, and whose `features` are those of its last run.

    Raises:
        InputError: `dictionary` is none, or `source` comes after `site`.
    """
    if not (callable(getattr(dictionary, "encode", None)) and callable(getattr(dictionary, "decode", None))):
        raise errors.InputError(
            f"A dictionary has encode(value) and decode(features); {type(dictionary).__name__} has not."
        )
    into = model.site(site, layer)
    given = into if source is None else model.site(source, layer)
    if into < given:
        raise errors.InputError(
            f"{given!r} comes after {into!r}: the dictionary cannot be given what is not there yet."
        )
    seen = _Seen()
    with model.edit() as edited:
        value = given.read()
        live = value if given == into else into.read()
        into.write(_reconstruct(dictionary, value, live, error, change, seen))
    return Spliced(edited, seen)


def _reconstruct(
    dictionary: Dictionary,
    value: torch.Tensor,
    live: torch.Tensor,
    error: bool,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    seen: _Seen,
) -> torch.Tensor:
    """What is to stand for `live`, from the features of `value`."""
    features: Any = dictionary.encode(value)
    kept = features if change is None else change(features)
    seen.features = kept
    new = dictionary.decode(kept)
    if new.shape != live.shape:
        raise errors.InputError(f"The dictionary gives {list(new.shape)} where the model has {list(live.shape)}.")
    if not error:
        return new.to(live)
    # The error is no part of what a gradient flows through: it stands for what the dictionary does not know.
    missing = (live - dictionary.decode(features)).detach()
    return (new + missing).to(live)
