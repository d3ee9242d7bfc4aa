"""Compute attention over sequences that are spread over the processes of torch.distributed.

All functions of fastlm take DTensors, too: see dtensor/.
"""

from . import dtensor_calls as dtensor_calls  # registers DTensor with the ops
from .attention import attention, varlen_attention
from .context import context_parallel

__all__ = ["attention", "context_parallel", "varlen_attention"]
