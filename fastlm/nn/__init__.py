"""Modules on fastlm's ops."""

from .gaussian_latent import GaussianLatent

__all__ = ["GaussianLatent"]
