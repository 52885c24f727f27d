"""Experiments on language models: functions that take a model and prompts and return data."""

from ._ablation import ablate as ablate
from ._attribution import attribution_patching as attribution_patching
from ._direct import direct_logit_attribution as direct_logit_attribution
from ._heads import detect_heads as detect_heads
from ._lens import logit_lens as logit_lens
from ._lens import patchscope as patchscope
from ._measure import measure as measure
from ._metrics import Metric as Metric
from ._metrics import cross_entropy as cross_entropy
from ._metrics import kl as kl
from ._metrics import log_prob as log_prob
from ._metrics import logit_diff as logit_diff
from ._metrics import prob as prob
from ._metrics import rank as rank
from ._patching import activation_patching as activation_patching
from ._paths import path_patching as path_patching
from ._result import Result as Result
from ._splice import Dictionary as Dictionary
from ._splice import Spliced as Spliced
from ._splice import splice as splice
from ._steering import Steered as Steered
from ._steering import steer as steer
from ._steering import steering_vector as steering_vector
from ._tuned import TunedLens as TunedLens
from ._tuned import tuned_lens as tuned_lens
