"""Small random models of every architecture that is served, built from their configs: one row of data a family."""

from __future__ import annotations

from ._decoders import DECODERS
from ._family import VOCABULARY as VOCABULARY
from ._family import Family as Family
from ._family import build as build
from ._family import inputs as inputs
from ._family import prompts as prompts
from ._mixtures import MIXTURES, STATE_SPACE
from ._others import MULTIMODAL, TEXT
from ._pipelines import PIPELINES as PIPELINES

FAMILIES = {family.name: family for family in [*DECODERS, *MIXTURES, *STATE_SPACE, *TEXT, *MULTIMODAL]}
