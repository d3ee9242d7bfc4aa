"""Run linear on the CPU: the rule that says which products torch is slow at, and the kernel's call."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backend import cpu as native
from ..checks import UP_TO_FLOAT32, autocast_dtype
from ..torch_op import are_plain, may_bypass_dispatcher
from .call import requires_grad


def why_not(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Return why the kernel cannot take a product, or None. torch has its own errors for tensors that do not fit."""
    if not _is_dense(input) or not _is_dense(weight) or not are_plain((input, weight, bias)):
        return "torch has products of its own for sparse and nested tensors and for subclasses of Tensor"
    if reason := native.why_not(input):
        return reason
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own ops"
    if not _fit_together(input, weight, bias):
        return "the tensors do not fit together"
    dtype = autocast_dtype(input)
    return None if dtype in UP_TO_FLOAT32 else f"the kernel has no product of {dtype}"


def _is_dense(tensor: Tensor) -> bool:
    if not isinstance(tensor, Tensor) or tensor.is_nested:
        return False
    return torch.compiler.is_compiling() or tensor.layout is torch.strided  # torch.compile cannot ask in a backward.


def _fit_together(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether torch takes the tensors without an error. It has more ways to read a bias, which are rare."""
    if not weight.is_cpu or weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return False
    if bias is not None and not (bias.is_cpu and bias.dim() == 1 and bias.shape[0] == weight.shape[0]):
        return False
    dtype = autocast_dtype(input)
    return autocast_dtype(weight) is dtype and (bias is None or autocast_dtype(bias) is dtype)


# ---- the rule ---------------------------------------------------------------------------------------------------------------

# From how many rows of input, and up to how many, the kernel is faster than torch: for weights whose depth is contiguous, and
# for transposed ones. Measured with torch 2.13 on a Sapphire Rapids, a Zen 4 and a Zen 5, whose oneDNN and MKL were also
# restricted to older instruction sets (ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS).
_ANY, _NEVER = (1, 1 << 62), (1, 0)
_ANYWHERE = (_ANY, _ANY)
_NOWHERE = (_NEVER, _NEVER)
_FASTER = {
    "avx2": {torch.float32: ((1, 8), (2, 24)), torch.bfloat16: _ANYWHERE, torch.float16: _ANYWHERE},
    "avx512": {torch.float32: ((1, 32), (2, 16)), torch.bfloat16: _ANYWHERE, torch.float16: _ANYWHERE},
}
# Where torch's products of bfloat16 have instructions: AVX512-BF16's, or AMX's.
_FASTER_BFLOAT16 = {"avx512_bf16": ((1, 32), (1, 8)), "amx": ((1, 8), (1, 4))}
# torch's float32 product is MKL's, which reaches 0.6 to 0.9 of the kernel's speed on the processors of others than Intel.
_IS_INTEL = native.C is not None and native.C.is_intel()
# Below so many weights, which lie in the cache, torch's float32 product costs less than the call of ours; but with weights of
# the second size or more and this many multiply-adds, others than Intel's spend more on MKL's product than on a call.
_FEWEST_WEIGHTS = (1 << 19) + 1 if _IS_INTEL else 1 << 17
_FEWEST_WEIGHTS_OF_MANY_ROWS, _FEWEST_PRODUCTS = 1 << 16, 1 << 22


def _rule() -> dict[torch.dtype, tuple[tuple[int, int], tuple[int, int]]]:
    """Return the part of the rule that holds on this machine."""
    isa = native.C.isa() if native.C else "none"
    rule = dict(_FASTER.get(isa.removesuffix("_bf16"), {}))
    if not rule:
        return rule
    if not _IS_INTEL:
        rule[torch.float32] = _ANYWHERE
    if isa.startswith("avx512") and torch.cpu._is_amx_tile_supported():
        rule[torch.bfloat16] = _FASTER_BFLOAT16["amx"]
    elif isa.startswith("avx512") and torch.cpu._is_avx512_bf16_supported():
        rule[torch.bfloat16] = _FASTER_BFLOAT16["avx512_bf16"]
    return rule


_RULE = _rule()


def _rows_won(dtype: torch.dtype, weights: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rule's two ranges of rows for a product in that dtype with so many weights."""
    if dtype is not torch.float32 or weights >= _FEWEST_WEIGHTS:
        return _RULE.get(dtype, _NOWHERE)
    if _IS_INTEL or not _RULE or weights < _FEWEST_WEIGHTS_OF_MANY_ROWS:
        return _NOWHERE
    many = _FEWEST_PRODUCTS // weights, _ANY[1]
    return many, many


def is_faster(dtype: torch.dtype, input: Tensor, weight: Tensor) -> bool:
    """Tell whether the kernel is faster than torch for tensors that fit together."""
    out_features, depth = weight.shape
    fewest, most = _rows_won(dtype, out_features * depth)[weight.stride(1) != 1 and depth > 1]
    return fewest <= input.numel() // max(depth, 1) <= most


def gains(weight: Tensor) -> bool:
    """Tell whether there is a number of rows for which the kernel is faster than torch with these weights (N, K) or (K, N)."""
    if not are_plain((weight,)) or not _is_dense(weight) or native.why_not(weight) or weight.dim() != 2:
        return False
    return _rows_won(weight.dtype, weight.numel()) != _NOWHERE


def why_slower(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Return why torch's own product is as fast as the kernel's for these tensors, or None."""
    dtype = autocast_dtype(input)
    if is_faster(dtype, input, weight):
        return None
    return f"torch's own product of so many rows in {dtype} is as fast on this machine"


# ---- the call ---------------------------------------------------------------------------------------------------------------


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return out (..., N). Tensors whose strides the kernel cannot read are copied first."""
    if input.shape[-1] == 0:
        return F.linear(input, weight, bias)  # a sum of nothing
    view = native.view
    out = native.empty(input, (*input.shape[:-1], weight.shape[0]))
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    rest = view(bias), view(out), torch.get_num_threads()
    if not native.C.linear(view(input), view(weight), *rest):
        native.C.linear(view(input.contiguous()), view(weight.contiguous()), *rest)
    return out


def fast_path(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return out of an ordinary call at the least cost, by whichever product is faster; None for any other call."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    if torch._C._is_any_autocast_enabled() or type(input) is not Tensor:
        return None
    if input.dtype is torch.float32 and isinstance(weight, Tensor) and weight.numel() < _FEWEST_WEIGHTS_OF_MANY_ROWS:
        return F.linear(input, weight, bias)  # It is torch's, whatever else is asked below, and too short to ask.
    if not _is_dense(weight) or weight.dim() != 2 or not (bias is None or isinstance(bias, Tensor)):
        return None
    if not input.is_cpu or not is_faster(input.dtype, input, weight):
        return F.linear(input, weight, bias)
    if (torch.is_grad_enabled() and requires_grad(input, weight, bias)) or not may_bypass_dispatcher(input, weight, bias):
        return None
    try:
        return forward(input, weight, bias)
    except ValueError:  # They do not fit together. torch has the error for the user.
        return None
