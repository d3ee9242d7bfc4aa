"""Check what flash_attn's functions are given, with flash_attn's errors, and turn its options into fastlm's.

flash_attn's checks are RuntimeErrors (of its C++ code) and AssertionErrors. Most arguments are checked again here only where
fastlm has refused them, so that other calls cost no more. What flash_attn refuses only because its kernels cannot do it is
done: CPUs, float32, values of another head_dim, any number of rows in a page, softcap with dropout.
"""

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
UNLIMITED = (-1, -1)  # a window of all keys


def check_call(q: Tensor, alibi_slopes: Tensor | None) -> None:
    """Check q (..., D) and slopes (H,) or (B, H) for what flash_attn refuses and fastlm would take."""
    if q.dtype not in DTYPES:
        raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type (fastlm also float32); q is {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise RuntimeError(f"FlashAttention forward only supports head dimension at most 256; got {q.shape[-1]}")
    if alibi_slopes is not None:
        if alibi_slopes.dtype is not torch.float32:
            raise RuntimeError(f"ALiBi slopes must have dtype fp32; got {alibi_slopes.dtype}")
        if alibi_slopes.shape[-1] > 1 and alibi_slopes.stride(-1) != 1:
            raise RuntimeError("ALiBi slopes tensor must have contiguous last dimension")


def explain_refusal(q: Tensor, k: Tensor, v: Tensor, **indices: Tensor | int | None) -> None:
    """Raise flash_attn's error for tensors (..., rows, heads, D) or index tensors that fastlm refused, if it has one."""
    for name, tensor in (("key", k), ("value", v)):
        if tensor.dtype is not q.dtype:
            raise RuntimeError(f"query and {name} must have the same dtype; got {q.dtype} and {tensor.dtype}")
    heads, head_dim = q.shape[-2:]
    if k.shape[-1] != head_dim:
        raise RuntimeError(f"k must have shape (..., {head_dim}), with q's head_dim; got {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise RuntimeError(f"v must have shape ({', '.join(map(str, k.shape[:-1]))}, head_dim), as k; got {tuple(v.shape)}")
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise RuntimeError(f"Number of heads in key/value must divide number of heads in query; got {k.shape[-2]} and {heads}")
    for name, tensor in indices.items():
        if isinstance(tensor, Tensor) and tensor.dtype is not torch.int32:
            raise RuntimeError(f"{name} must have dtype int32; got {tensor.dtype}")


def window_of(window_size: tuple[int, int]) -> tuple[int | None, int | None] | None:
    """Return fastlm's window for flash_attn's (left, right), in which a negative side sets no limit."""
    left, right = window_size
    if left < 0 and right < 0:
        return None
    return (None if left < 0 else left), (None if right < 0 else right)
