"""Check the arguments of the attention functions, and turn options into numbers. The checks are cheap if nothing is wrong.

The backends check the numbers inside index tensors (cu_seqlens, cache_seqlens, block_table), because they read them anyway.
"""

import math

import torch
from torch import Tensor

from ..checks import as_integer, check_number, check_tensor, is_integer
from ..torch_op import has_tangent

BATCHED = "batch, heads, rows, head_dim"
VARLEN = "total, heads, head_dim"
PAGED = "pages, rows of a page, heads, head_dim"

# ---- tensors ----------------------------------------------------------------------------------------------------------------


def check_rows(name: str, tensor: Tensor, order: str) -> None:
    """Check for a tensor with the dimensions that ``order`` names, e.g. "total, heads, head_dim"."""
    check_tensor(name, tensor)
    dims = 3 if order is VARLEN else 4
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions ({order}); got shape {tuple(tensor.shape)}")


def no_columns(query: Tensor, value: Tensor) -> str | None:
    """Return why no kernel takes a head_dim of 0, or None without one. torch gives all keys the same weight there."""
    return None if query.shape[-1] and value.shape[-1] else "a head_dim of 0 runs on the reference"


def check_keys(query: Tensor, key: Tensor, value: Tensor, names: tuple[str, str] = ("key", "value")) -> None:
    """Check that key and value belong together and fit the query."""
    check_like(names[0], key, "query", query)
    check_like(names[1], value, "query", query)
    head_dim = query.shape[-1]
    *key_outer, key_dim = key.shape
    *value_outer, _ = value.shape
    if key_dim != head_dim:
        raise ValueError(f"{names[0]} must have query's head_dim {head_dim}; got shape {tuple(key.shape)}")
    if value_outer != key_outer:
        expected = ", ".join(map(str, key_outer))
        raise ValueError(f"{names[1]} must have {names[0]}'s shape ({expected}, any head_dim); got {tuple(value.shape)}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check for a tensor of the dtype and on the device of another."""
    if tensor.dtype is not other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}; got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}; got {tensor.device}")


def check_groups(query_heads: int, key_heads: int, name: str = "key") -> None:
    """Check that the number of key heads divides the number of query heads."""
    if query_heads % key_heads if key_heads else query_heads:
        raise ValueError(f"{name} must have a number of heads that divides query's {query_heads}; got {key_heads}")


def check_mask(mask: Tensor | None, shape: tuple[int, ...], device: torch.device, name: str = "mask") -> None:
    """Check for a bool or floating mask that broadcasts to ``shape``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor or None; got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"{name} must be bool (True: attend) or floating (added to the scores); got {mask.dtype}")
        check_tensor(name, mask)
    if mask.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {mask.layout}")
    if mask.dim() > len(shape) or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(shape))):
        raise ValueError(f"{name} must broadcast to {tuple(shape)}; got shape {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{name} must be on query's device {device}; got {mask.device}")


def check_per_head(slopes: Tensor | None, sinks: Tensor | None, batch: int, query: Tensor, heads: int) -> None:
    """Check alibi_slopes, (heads,) or (batch, heads), and sinks, (heads,), both of any floating dtype."""
    if slopes is not None:
        check_tensor("alibi_slopes", slopes)
        if tuple(slopes.shape) not in ((heads,), (batch, heads)):
            raise ValueError(f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}); got {tuple(slopes.shape)}")
        if slopes.device != query.device:
            raise ValueError(f"alibi_slopes must be on query's device {query.device}; got {slopes.device}")
    if sinks is not None:
        check_tensor("sinks", sinks)
        if tuple(sinks.shape) != (heads,):
            raise ValueError(f"sinks must have shape ({heads},), one per query head; got {tuple(sinks.shape)}")
        if sinks.device != query.device:
            raise ValueError(f"sinks must be on query's device {query.device}; got {sinks.device}")


def check_no_gradient(slopes: Tensor | None) -> None:
    """Refuse slopes that require a gradient or have a tangent, which would silently be missing."""
    if slopes is not None and ((slopes.requires_grad and torch.is_grad_enabled()) or has_tangent(slopes)):
        raise ValueError("alibi_slopes get no gradient: pass alibi_slopes.detach(), or a float mask, which gets one")


def check_writable(name: str, cache: Tensor) -> None:
    """Check that a cache may be written in place unseen by autograd, as torch's in-place operations check."""
    if cache.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} is written in place, without a gradient: pass {name}.detach(), or call under torch.no_grad()")
    if any(step == 0 and length > 1 for step, length in zip(cache.stride(), cache.shape)):
        raise ValueError(f"{name} is written in place: its rows must not share memory, as those of an expanded tensor do")


def check_indices(name: str, tensor: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Check for an int32 tensor of ``shape``, where None allows any size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be an int32 tensor; got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(n is not None and s != n for s, n in zip(tensor.shape, shape)):
        expected = ", ".join("*" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({expected}); got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on query's device {device}; got {tensor.device}")


# ---- options ----------------------------------------------------------------------------------------------------------------


_FAR = 1 << 48  # Keys. A wider side of a window sets no limit.


def window_bounds(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """Return (left, right): how many keys a query sees on each side of its own position; None is all of them."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool; got {type(causal).__name__}")
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window must be a pair (left, right); got {window!r}")
        left, right = (_window_side(side, window) for side in window)
    return left, (0 if causal else right)


def _window_side(side: int | None, window: tuple) -> int | None:
    if side is None:
        return None
    if not is_integer(side):
        raise TypeError(f"window must hold integers or None; got {window!r}")
    if side < 0:
        raise ValueError(f"window must not be negative; got {window!r}")
    return as_integer(side) if side < _FAR else None


_FLOAT32_MAX = torch.finfo(torch.float32).max
# In float32, a smaller cap acts like the first one (no score counts), and a larger cap than the second acts like none.
_SOFTCAPS = 2.0**-126, 2.0**100


def score_options(scale: float | None, softcap: float | None, head_dim: int) -> tuple[float, float]:
    """Return (scale, softcap) as floats. The default scale is 1 / sqrt(head_dim); a softcap of 0 means none."""
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    else:
        scale = check_number("scale", scale, -math.inf)
        if abs(scale) > _FLOAT32_MAX:
            raise ValueError(f"scale must be a number of float32's range; got {scale}")
    if softcap is None:
        return scale, 0.0
    softcap = check_number("softcap", softcap, 0.0)
    if softcap == 0.0:
        raise ValueError("softcap must be positive, or None for no softcap; got 0.0")
    return scale, min(max(softcap, _SOFTCAPS[0]), _SOFTCAPS[1])


def check_dropout_p(dropout_p: float) -> float:
    """Check for a probability. 1 drops all weights, as in torch's attention."""
    dropout_p = check_number("dropout_p", dropout_p, 0.0)
    if dropout_p > 1.0:
        raise ValueError(f"dropout_p must lie between 0 and 1; got {dropout_p}")
    return dropout_p
