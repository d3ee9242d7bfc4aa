"""The calls that are left to torch's own code, whatever their shapes and dtypes: what drop-ins ask before they run fused."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..ops.torch_op import constant_when_compiled

# The last two are how torch.compile and torch.export see any tensor. Every other class may give ops another meaning, as DTensor
# does, or keep its numbers elsewhere. None is a tensor that was not given.
PLAIN = frozenset((type(None), Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor))
SUBCLASS = "a subclass of Tensor"


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Say whether no tensor among ``tensors`` is of a class that gives torch's ops a meaning of its own."""
    return PLAIN.issuperset(map(type, tensors))


def call_why_not(tensors: Iterable[Tensor | None]) -> str | None:
    """Say why a call with these tensors, masks and weights among them, has to be torch's own, or return None."""
    if not are_plain(tensors):
        return SUBCLASS
    if torch.jit.is_tracing():
        return "torch.jit.trace records torch's own ops"
    if only_math_is_enabled():
        return "torch is restricted to its math backend (torch.nn.attention.sdpa_kernel)"
    return None


@constant_when_compiled  # torch.compile traces none of the switches: they are as they were at compilation
def only_math_is_enabled() -> bool:
    """Say whether the user has switched off torch's own fused attention, as one does for derivatives of any order."""
    cuda = torch.backends.cuda  # torch's name for the switches of all devices
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


def mask_dtype_fits(mask: Tensor, query: Tensor) -> bool:
    """Say whether torch's scaled_dot_product_attention takes a mask of this dtype. Autocast makes them one."""
    return mask.dtype in (torch.bool, torch.float32, query.dtype) or torch.is_autocast_enabled(query.device.type)
