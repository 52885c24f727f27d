"""Experiments on language models: functions that take a model and prompts and return data."""

from ._collect import collect_activations as collect_activations
from ._store import ActivationStore as ActivationStore
