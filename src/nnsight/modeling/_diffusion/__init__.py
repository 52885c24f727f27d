"""Diffusion: pipelines of diffusers, denoising step by denoising step."""

from ._model import DiffusionModel as DiffusionModel
