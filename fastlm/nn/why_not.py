"""The conditions under which drop-ins leave a call to torch's own code, whatever its shapes and dtypes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..ops.tensor_classes import are_known
from ..ops.torch_op import constant_when_compiled

SUBCLASS = "a subclass of Tensor"


def call_why_not(tensors: Iterable[Tensor | None]) -> str | None:
    """Return why torch's own code must run a call with these tensors, including masks and weights, or None."""
    if not are_known(tensors):
        return SUBCLASS
    if torch.jit.is_tracing():
        return "torch.jit.trace records torch's own ops"
    if only_math_is_enabled():
        return "torch is restricted to its math backend (torch.nn.attention.sdpa_kernel)"
    return None


@constant_when_compiled  # torch.compile does not trace the switches; they keep their values of the compilation
def only_math_is_enabled() -> bool:
    """Return whether the user has switched off torch's own fused attention, as one does for derivatives of any order."""
    cuda = torch.backends.cuda  # holds the switches of all devices
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


def mask_dtype_fits(mask: Tensor, query: Tensor) -> bool:
    """Return whether torch's scaled_dot_product_attention takes a mask of this dtype; autocast converts any dtype."""
    return mask.dtype in (torch.bool, torch.float32, query.dtype) or torch.is_autocast_enabled(query.device.type)
