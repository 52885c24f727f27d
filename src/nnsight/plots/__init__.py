"""Figures of results; needs the `plots` extra."""

from ._heatmap import heatmap as heatmap
