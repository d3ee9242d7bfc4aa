"""Compute attention over sequences that are spread over the processes of torch.distributed."""

from .attention import attention, varlen_attention
from .context import context_parallel

__all__ = ["attention", "context_parallel", "varlen_attention"]
