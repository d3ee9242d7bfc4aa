"""Compute attention over sequences that are spread over the processes of torch.distributed."""

from .attention import attention, varlen_attention

__all__ = ["attention", "varlen_attention"]
