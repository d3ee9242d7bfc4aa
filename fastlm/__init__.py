"""Provide fused attention and VAE kernels for PyTorch language models, as drop-in replacements."""

from . import distributed, nn
from .backend import UnsupportedError, backends, explain
from .nn.replace import replace, restore
from .nn.use import disable, enable, use
from .nn.watch import watch
from .ops.attention import (
    AttentionStats,
    attention,
    attention_weights,
    kvcache_attention,
    scaled_dot_product_attention,
    top_keys,
    varlen_attention,
)
from .ops.latent import gaussian_kl, reparameterize, reparameterize_with_kl
from .ops.linear import linear

__version__ = "0.1.0"
__all__ = [
    "AttentionStats",
    "UnsupportedError",
    "attention",
    "attention_weights",
    "backends",
    "disable",
    "distributed",
    "enable",
    "explain",
    "gaussian_kl",
    "kvcache_attention",
    "linear",
    "nn",
    "reparameterize",
    "reparameterize_with_kl",
    "replace",
    "restore",
    "scaled_dot_product_attention",
    "top_keys",
    "use",
    "varlen_attention",
    "watch",
]
