"""The functions of torch that may follow a product of queries and keys in hand-written attention."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.torch_op import is_ordinary
from .chain import Chain

# A step is described by (the chain before it, the arguments without the chain's tensor, the position of that tensor).
# The description is the chain after it; SAME, where torch returns the tensor itself; or None for what only torch can do.
SAME = object()
Description = Chain | object | None


def _number(x: object) -> float | None:
    """Return a number, also that of a constant tensor on the CPU, or None."""
    if isinstance(x, (int, float)):
        return float(x)
    is_constant = is_ordinary(x) and x.dim() == 0 and x.is_cpu and not x.requires_grad and not x.is_complex()
    return float(x) if is_constant else None


def _multiply(chain: Chain, at: int, other: object) -> Description:
    number = _number(other)
    if number is not None:
        return chain.times(number)
    return chain.times(other) if isinstance(other, Tensor) else None


def _divide(chain: Chain, at: int, other: object) -> Description:
    number = _number(other)
    return chain.times(1.0 / number) if at == 0 and number else None


def _add(chain: Chain, at: int, other: object) -> Description:
    return chain.plus(other) if isinstance(other, Tensor) and _keeps_order(at, other) else None


def _subtract(chain: Chain, at: int, other: object) -> Description:
    return chain.plus(other, -1.0) if at == 0 and isinstance(other, Tensor) else None


def _keeps_order(at: int, other: Tensor) -> bool:
    """Tell whether torch lays out the result as it would the scores: torch follows the first tensor."""
    if at == 0 or other.dim() < 2:
        return True
    strides = [stride for stride, size in zip(other.stride(), other.shape) if size > 1 and stride > 0]
    return all(first >= second for first, second in zip(strides, strides[1:]))


def _fill(chain: Chain, at: int, mask: object, value: object) -> Description:
    number = _number(value)
    return chain.hide(mask, True, number) if number is not None and isinstance(mask, Tensor) and at == 0 else None


def _where(chain: Chain, at: int, condition: object, other: object) -> Description:
    """Describe torch.where(condition, scores, fill) and torch.where(condition, fill, scores)."""
    number = _number(other)
    if at == 0 or number is None or not isinstance(condition, Tensor) or not _keeps_order(at, condition):
        return None
    return chain.hide(condition, at == 2, number)


def _where_of_scores(chain: Chain, at: int, condition: object, other: object) -> Description:
    """Describe scores.where(condition, fill)."""
    return _where(chain, 1, condition, other) if at == 0 else None


def _softmax(
    chain: Chain, at: int, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Description:
    return chain.softmax(dim, dtype or _softmax_dtype(chain)) if isinstance(dim, int) else None


def _softmax_of_torch(chain: Chain, at: int, dim: int | None = None, dtype: torch.dtype | None = None) -> Description:
    return _softmax(chain, at, dim, dtype=dtype)


def _softmax_dtype(chain: Chain) -> torch.dtype:
    device = chain.query.device.type
    return _dtype_under_autocast(device, chain.dtype) if torch.is_autocast_enabled(device) else chain.dtype


@functools.cache
def _dtype_under_autocast(device: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a softmax under autocast, which leaves it alone or computes it in float32, whatever its own dtype."""
    return torch.softmax(torch.zeros(1, dtype=dtype, device=device), 0).dtype


def _dropout(chain: Chain, at: int, p: float = 0.5, training: bool = True, inplace: bool = False) -> Description:
    if not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
        return None
    if not training or p == 0.0:
        return SAME
    return None if inplace else chain.dropout(float(p))


def _dropout_of_torch(chain: Chain, at: int, p: float, train: bool) -> Description:
    return _dropout(chain, at, p, train)


def _cast(chain: Chain, dtype: torch.dtype) -> Description:
    return SAME if dtype == chain.dtype else chain.cast(dtype)


def _cast_to(chain: Chain, at: int, *args, dtype: torch.dtype | None = None, device: object = None) -> Description:
    """Describe to(dtype), to(device) of the same device, to(device, dtype), to(other)."""
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, (str, torch.device, int)) and not isinstance(arg, bool):
            device = arg
        else:
            return None
    if device is not None and torch.device(device) != chain.query.device:
        return None
    return _cast(chain, chain.dtype if dtype is None else dtype)


def _cast_by(dtype: torch.dtype) -> Callable[[Chain, int], Description]:
    return lambda chain, at: _cast(chain, dtype)


def _type(chain: Chain, at: int, dtype: object) -> Description:
    return _cast(chain, dtype) if isinstance(dtype, torch.dtype) else None


def _type_as(chain: Chain, at: int, other: object) -> Description:
    return _cast(chain, other.dtype) if at == 0 and isinstance(other, Tensor) and other.device == chain.query.device else None


def _view(chain: Chain, at: int, *sizes) -> Description:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if not all(type(size) is int for size in sizes) or sizes.count(-1) > 1 or any(size < -1 for size in sizes):
        return None
    count, known = math.prod(chain.shape), math.prod(size for size in sizes if size != -1)
    if -1 in sizes and known:
        sizes = tuple(count // known if size == -1 else size for size in sizes)
    return chain.view(sizes) if math.prod(sizes) == count else None


def _reshape_of_torch(chain: Chain, at: int, shape: object) -> Description:
    return _view(chain, at, *shape) if isinstance(shape, (tuple, list)) else None


def _flatten(chain: Chain, at: int, start_dim: int = 0, end_dim: int = -1) -> Description:
    dims = len(chain.shape)
    start, end = start_dim % dims, end_dim % dims
    if not -dims <= min(start_dim, end_dim) or not max(start_dim, end_dim) < dims or not start < end:
        return None
    return chain.view((*chain.shape[:start], math.prod(chain.shape[start : end + 1]), *chain.shape[end + 1 :]))


def _unflatten(chain: Chain, at: int, dim: int, sizes: object) -> Description:
    if dim != 0 or not isinstance(sizes, (tuple, list)):
        return None
    return _view(chain, at, *sizes, *chain.shape[1:])


def _unsqueeze(chain: Chain, at: int, dim: int) -> Description:
    place = dim if dim >= 0 else dim + len(chain.shape) + 1
    return chain.view((*chain.shape[:place], 1, *chain.shape[place:])) if 0 <= place <= len(chain.shape) else None


def _squeeze(chain: Chain, at: int, dim: int) -> Description:
    place = dim if dim >= 0 else dim + len(chain.shape)
    if not 0 <= place < len(chain.shape) or chain.shape[place] != 1:
        return None
    return chain.view((*chain.shape[:place], *chain.shape[place + 1 :]))


def _mean(chain: Chain, at: int, dim: int, keepdim: bool = False) -> Description:
    return chain.average(dim) if isinstance(dim, int) and not keepdim else None


def _contiguous(chain: Chain, at: int) -> Description:
    return SAME  # as all chains are


def _clone(chain: Chain, at: int) -> Description:
    return chain


class Step(NamedTuple):
    """A function that may follow, and how it is described."""

    describe: Callable[..., Description]
    function: Callable
    out_of_place: Callable | None = None  # computes the same, if the function writes in place
    is_view: bool = False


def _table() -> dict[Callable, Step]:
    steps: dict[Callable, Step] = {}

    def enter(describe: Callable, *functions: Callable, writing: tuple[Callable, ...] = (), is_view: bool = False) -> None:
        """Enter ``functions``, and those that write in place what the first of them returns."""
        for function in functions:
            steps[function] = Step(describe, function, is_view=is_view)
        for function in writing:
            steps[function] = Step(describe, function, out_of_place=functions[0])

    enter(_multiply, Tensor.mul, torch.mul, Tensor.multiply, torch.multiply, writing=(Tensor.mul_, Tensor.multiply_))
    enter(_multiply, Tensor.__mul__, Tensor.__rmul__, writing=(Tensor.__imul__,))
    enter(_divide, Tensor.div, torch.div, Tensor.divide, torch.divide, writing=(Tensor.div_, Tensor.divide_))
    enter(_divide, Tensor.true_divide, torch.true_divide, writing=(Tensor.true_divide_,))
    enter(_divide, Tensor.__truediv__, writing=(Tensor.__itruediv__,))
    enter(_add, Tensor.add, torch.add, Tensor.__add__, Tensor.__radd__, writing=(Tensor.add_, Tensor.__iadd__))
    enter(_subtract, Tensor.sub, torch.sub, Tensor.subtract, torch.subtract, writing=(Tensor.sub_, Tensor.subtract_))
    enter(_subtract, Tensor.__sub__, writing=(Tensor.__isub__,))
    enter(_fill, Tensor.masked_fill, torch.masked_fill, writing=(Tensor.masked_fill_,))
    enter(_where, torch.where)
    enter(_where_of_scores, Tensor.where)
    enter(_softmax, F.softmax)
    enter(_softmax_of_torch, Tensor.softmax, torch.softmax)
    enter(_dropout, F.dropout)
    enter(_dropout_of_torch, torch.dropout)
    enter(_cast_to, Tensor.to)
    enter(_cast_by(torch.float32), Tensor.float)
    enter(_cast_by(torch.float16), Tensor.half)
    enter(_cast_by(torch.bfloat16), Tensor.bfloat16)
    enter(_type, Tensor.type)
    enter(_type_as, Tensor.type_as)
    enter(_view, Tensor.view, Tensor.reshape, is_view=True)
    enter(_reshape_of_torch, torch.reshape, is_view=True)
    enter(_flatten, Tensor.flatten, torch.flatten, is_view=True)
    enter(_unflatten, Tensor.unflatten, torch.unflatten, is_view=True)
    enter(_unsqueeze, Tensor.unsqueeze, torch.unsqueeze, is_view=True)
    enter(_squeeze, Tensor.squeeze, torch.squeeze, is_view=True)
    enter(_mean, Tensor.mean, torch.mean)
    enter(_contiguous, Tensor.contiguous)
    enter(_clone, Tensor.clone, torch.clone)
    return steps


STEPS = _table()
