"""Read a product of torch as one of queries with keys, or as one of weights with values."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops.attention import has_kernel
from ...ops.torch_op import are_plain, is_eager, is_ordinary
from .chain import MAX_HEAD_DIM, Chain
from .fold import Shape

# A product of fewer scores, or over fewer keys, takes torch's calls no longer than recording them and one call of attention.
# (least scores, least keys) without and with gradients; measured with two threads of a Zen 3. Windows of 49 keys, as Swin's,
# lose 1 to 5 % of a training step on a Zen 5.
LEAST = (1 << 18, 96), (1 << 16, 64)


class Operands(NamedTuple):
    """Two tensors (*lead, rows, inner) and (*lead, inner, columns) as they are multiplied, and how their product is used."""

    left: Tensor
    right: Tensor
    added: Tensor | None = None
    beta: float = 1.0  # times what is added
    alpha: float = 1.0  # times the product
    dims: tuple[int, ...] | None = None  # the product's dimensions in the order in which torch returns them


def _matmul(input: object, other: object) -> Operands | None:
    fits = _are_tensors(input, other) and 3 <= input.dim() <= 5 and input.dim() == other.dim()
    return Operands(input, other) if fits else None


def _bmm(input: object, mat2: object) -> Operands | None:
    fits = _are_tensors(input, mat2) and input.dim() == mat2.dim() == 3 and input.shape[0] == mat2.shape[0]
    return Operands(input, mat2) if fits else None


def _baddbmm(input: object, batch1: object, batch2: object, *, beta: float = 1, alpha: float = 1) -> Operands | None:
    operands = _bmm(batch1, batch2)
    numbers = isinstance(beta, (int, float)) and isinstance(alpha, (int, float))
    if operands is None or not numbers or not isinstance(input, Tensor):
        return None
    return operands._replace(added=input, beta=float(beta), alpha=float(alpha))


def _einsum(equation: object, *operands) -> Operands | None:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = operands[0]
    if not isinstance(equation, str) or len(operands) != 2 or not _are_tensors(*operands):
        return None
    plan = _plan(equation, operands[0].dim(), operands[1].dim())
    if plan is None:
        return None
    first, second = _permuted(operands[0], plan.left), _permuted(operands[1], plan.right)
    if first is None or second is None:
        return None
    for dim in plan.shared:
        second = second.unsqueeze(dim)
    batch = [1 if dim in plan.shared else size for dim, size in enumerate(first.shape[:-2])]
    if batch != list(second.shape[:-2]) or first.shape[-1] != second.shape[-2]:
        return None
    return Operands(first, second, dims=plan.out)


class _Plan(NamedTuple):
    """The orders of dimensions that make a product of an equation: see `Operands`."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    shared: tuple[int, ...]  # dimensions of the product's batch that the right tensor lacks, as heads that share keys
    out: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _plan(equation: str, left_dims: int, right_dims: int) -> _Plan | None:
    """Return how an equation of torch.einsum is a product of rows and columns, or None."""
    terms = _terms(equation, left_dims, right_dims)
    if terms is None:
        return None
    left, right, out = terms
    rows = [letter for letter in out if letter in left and letter not in right][-1:]
    columns = [letter for letter in out if letter in right and letter not in left]
    batch = [letter for letter in out if letter not in (*rows, *columns)]
    inner = [letter for letter in left if letter not in out]
    kept = [letter for letter in batch if letter in right]
    each_once = sorted(left) == sorted(batch + rows + inner) and sorted(right) == sorted(kept + inner + columns)
    if not each_once or not len(rows) == len(inner) == len(columns) == 1 or not 1 <= len(batch) <= 3:
        return None
    if batch[: len(kept)] != kept:  # Then torch lays out the product in another order.
        return None
    return _Plan(
        tuple(left.index(letter) for letter in (*batch, *rows, *inner)),
        tuple(right.index(letter) for letter in (*kept, *inner, *columns)),
        tuple(at for at, letter in enumerate(batch) if letter not in right),
        tuple((*batch, *rows, *columns).index(letter) for letter in out),
    )


def _permuted(tensor: Tensor, order: tuple[int, ...]) -> Tensor | None:
    """Return a tensor with its dimensions in that order, or None if that needs a view of a tensor that is not plain."""
    if order == tuple(range(len(order))):
        return tensor
    return tensor.permute(order) if are_plain((tensor,)) else None


def _terms(equation: str, left_dims: int, right_dims: int) -> tuple[str, str, str] | None:
    """Return an equation's three terms, "..." as digits, or None if it has others or letters twice."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow or not comma or "," in right:
        return None
    if "..." in left and "..." in right and "..." in out:
        outer = left_dims - len(left) + 3
        if outer != right_dims - len(right) + 3 or not 0 <= outer <= 3:
            return None
        left, right, out = (term.replace("...", "012"[:outer], 1) for term in (left, right, out))
    terms = left, right, out
    fits = len(left) == left_dims and len(right) == right_dims
    return terms if fits and all(term.isalnum() and len(set(term)) == len(term) for term in terms) else None


def _are_tensors(left: object, right: object) -> bool:
    both = isinstance(left, Tensor) and isinstance(right, Tensor)
    return both and not left.is_nested and not right.is_nested


READERS: dict[Callable, Callable[..., Operands | None]] = {
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    torch.einsum: _einsum,
}


def may_be_scores(args: tuple, kwargs: dict) -> bool:
    """Tell whether these may be arguments of a product of queries and keys, as fast as can be."""
    if kwargs or len(args) < 2:
        return len(kwargs) > 0
    if type(args[-1]) not in _ORDINARY:
        return isinstance(args[-1], (tuple, list))  # of torch.einsum
    query = args[-2]
    return type(query) in _ORDINARY and query.dim() > 2


_ORDINARY = (Tensor, nn.Parameter)


def read(function: Callable, args: tuple, kwargs: dict) -> Operands | None:
    """Return the operands of a call of one of READERS, or None if it is none of hand-written attention."""
    try:
        return READERS[function](*args, **kwargs)
    except TypeError:  # Arguments that none of ours has.
        return None


def pays(scores: int, keys: int, query: Tensor, key: Tensor) -> bool:
    """Tell whether to defer a product of that size."""
    least_scores, least_keys = LEAST[torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)]
    return scores >= least_scores and keys >= least_keys


TOO_SMALL = "hand-written scores too few to gain by one call"


def scores_of(operands: Operands, count: Callable[[str], None]) -> Chain | None:
    """Return the chain that begins with this product if it is one of queries with transposed keys, or None.

    A product that is, but too small, is counted.
    """
    lead = lead_of(operands) if is_eager() else None
    if lead is None:
        return None
    rows, keys = operands.left.shape[-2], operands.right.shape[-1]
    if not pays(math.prod(lead) * rows * keys, keys, operands.left, operands.right):
        count(TOO_SMALL)
        return None
    tensors = operands.left, operands.right, operands.added
    return chain_of(operands, lead) if all(tensor is None or is_ordinary(tensor) for tensor in tensors) else None


def lead_of(operands: Operands) -> Shape | None:
    """Return the leading dimensions of a product of queries with transposed keys, or None if this is none by its layout."""
    query, transposed = operands.left, operands.right
    *outer, _, inner = query.shape
    *key_outer, key_inner, _ = transposed.shape
    step, next_key = transposed.stride()[-2:]
    if step != 1 or next_key < inner or inner != key_inner or not 1 < inner <= MAX_HEAD_DIM:
        return None
    if any(a != b and 1 not in (a, b) for a, b in zip(outer, key_outer)):
        return None
    dims = operands.dims
    if dims is not None and dims != tuple(range(len(dims))):
        return None
    return tuple(outer) if key_outer == outer else tuple(map(max, outer, key_outer))


def chain_of(operands: Operands, lead: Shape) -> Chain | None:
    """Return the chain that begins with a product of queries with transposed keys, or None if no kernel takes it."""
    query, transposed, added = operands[:3]
    device = query.device
    if query.dtype != transposed.dtype or device != transposed.device or not has_kernel(query, query):
        return None
    shape = (*lead, query.shape[-2], transposed.shape[-1])
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else query.dtype
    chain = Chain(query, transposed.transpose(-2, -1), lead, shape, dtype, scale=operands.alpha)
    if added is None or operands.beta == 0.0:
        return chain
    if added.device != device or (added.dtype != dtype and not autocast):
        return None
    chain = chain.plus(added, operands.beta)
    return None if chain is None else chain._replace(dtype=dtype)


def weights_first(function: Callable, args: tuple, at: int) -> tuple[tuple, int]:
    """Return the arguments of a product with values, and the position of the weights, so that these come first."""
    if function is torch.einsum and at == 2 and len(args) == 3:
        left, comma, rest = str(args[0]).partition(",")
        right, arrow, out = rest.partition("->")
        return (f"{right}{comma}{left}{arrow}{out}", args[2], args[1]), 1
    return args, at
