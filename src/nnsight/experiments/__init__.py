"""Experiments on language models: functions that take a model and prompts and return data."""

from ._collect import collect_activations as collect_activations
from ._das import Alignment as Alignment
from ._das import fit_das as fit_das
from ._graph import Flow as Flow
from ._graph import ModuleGraph as ModuleGraph
from ._graph import information_flow as information_flow
from ._graph import trace_graph as trace_graph
from ._probe import Probe as Probe
from ._probe import fit_probe as fit_probe
from ._spec import Intervention as Intervention
from ._spec import InterventionSpec as InterventionSpec
from ._store import ActivationStore as ActivationStore
