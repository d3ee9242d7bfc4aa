"""Modules on fastlm's ops, and the code that puts them into existing models."""

from .gaussian_latent import GaussianLatent
from .linear import Linear
from .multihead_attention import MultiheadAttention
from .transformer import TransformerEncoder, TransformerEncoderLayer

__all__ = ["GaussianLatent", "Linear", "MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer"]
