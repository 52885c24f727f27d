"""Figures of results, for paper and for the browser; needs the `plots` extra."""

from ._attention import attention as attention
from ._graph import graph as graph
from ._heatmap import heatmap as heatmap
from ._lens import lens_grid as lens_grid
from ._tokens import tokens as tokens
from ._trajectory import trajectory as trajectory
