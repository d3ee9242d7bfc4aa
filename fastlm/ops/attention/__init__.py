"""Compute exact attention without holding the Lq x Lk scores. Each public function and each backend has a file."""

from .batched import attention, has_kernel
from .kvcache import kvcache_attention
from .sdpa import scaled_dot_product_attention
from .stats import AttentionStats
from .varlen import varlen_attention
from .weights import attention_weights, top_keys

__all__ = [
    "AttentionStats",
    "attention",
    "attention_weights",
    "has_kernel",
    "kvcache_attention",
    "scaled_dot_product_attention",
    "top_keys",
    "varlen_attention",
]
