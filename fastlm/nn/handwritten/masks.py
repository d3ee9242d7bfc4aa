"""Merge what was added to scores, and what hid them, into the mask that attention takes."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.torch_op import is_ordinary
from .fold import Fold, Placed


class Bias(NamedTuple):
    """A floating tensor that was added to scores, ``factor`` times."""

    placed: Placed
    factor: float


class Hidden(NamedTuple):
    """A condition, and whether scores are hidden where it is True or where it is False."""

    placed: Placed
    where: bool

    def is_same(self, other: "Hidden") -> bool:
        """Tell whether both are the same memory, seen in the same way, in the same place."""
        mine, others = self.placed.tensor, other.placed.tensor
        if not is_ordinary(mine) or not is_ordinary(others):  # In a graph of torch.compile there is no memory.
            return mine is others and self == other
        same = mine.data_ptr() == others.data_ptr() and mine.shape == others.shape and mine.stride() == others.stride()
        return same and self.placed.lead == other.placed.lead and self.where == other.where


class Mask(NamedTuple):
    """What attention takes for all biases and conditions."""

    mask: Tensor | None  # bool (True: attend) or floating, broadcastable to (batch, heads, Lq, Lk)
    causal: bool  # on top of the mask
    attended: Tensor | None  # which keys no condition hides; bool, of such a shape


def merged_mask(fold: Fold, biases: tuple[Bias, ...], hidden: tuple[Hidden, ...], size: tuple[int, int]) -> Mask:
    """Merge everything into one mask for scores of ``size`` (Lq, Lk)."""
    causal = False
    added, attended = None, None  # (one size for each of fold.dims, Lq or 1, Lk or 1), so that all broadcast
    for bias in biases:
        if bias.factor == 1.0 and _is_causal(bias.placed.tensor, size, -math.inf):
            causal = True
            continue
        term = fold.spread(bias.placed)
        term = term if bias.factor == 1.0 else term * bias.factor
        added = term if added is None else added + term
    for condition in hidden:
        if _is_causal(condition.placed.tensor, size, condition.where):
            causal = True
            continue
        term = fold.spread(condition.placed)
        term = term.logical_not() if condition.where else term
        attended = term if attended is None else attended & term
    both = attended if added is None else added if attended is None else torch.where(attended, added, -math.inf)
    mask, attended = (None if spread is None else fold.fold_mask(spread) for spread in (both, attended))
    return Mask(mask, causal, attended)


# ---- causal masks: attention skips what they hide, where it would read a mask -----------------------------------------------


def _is_causal(mask: Tensor, size: tuple[int, int], hides: bool | float) -> bool:
    """Tell whether a mask hides, by the value ``hides``, exactly the keys behind each query, aligned at the last of both.

    On a GPU the comparison would make the CPU wait for it, and in a graph of torch.compile there are no values: nothing is
    compared there.
    """
    rows, keys = size
    if not is_ordinary(mask):
        return False
    if not mask.is_cpu or mask.shape[-2:] != size or mask.numel() != rows * keys or mask.requires_grad or not 1 < rows <= keys:
        return False
    mask = mask.reshape(size)
    behind = (_behind if keys <= 4096 else _behind.__wrapped__)(keys)[keys - rows :]
    if mask.dtype != torch.bool:
        return torch.equal(mask == hides, behind) and int(mask.count_nonzero()) == int(behind.count_nonzero())
    return torch.equal(mask, behind if hides else behind.logical_not())


@functools.lru_cache(maxsize=2)
def _behind(keys: int) -> Tensor:
    """Return which keys lie behind each of as many queries."""
    return torch.ones(keys, keys, dtype=torch.bool, device="cpu").triu(1)
