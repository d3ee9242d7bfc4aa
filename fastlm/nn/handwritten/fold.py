"""Fold the leading dimensions of hand-written attention, which may be any, into a batch and heads."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

Shape = tuple[int, ...]


class Placed(NamedTuple):
    """A tensor that meets scores (*lead, Lq, Lk), to which it broadcasts."""

    tensor: Tensor
    lead: Shape


class Fold(NamedTuple):
    """A way to see leading dimensions as (batch, heads).

    Views may have split and merged them from step to step: windows of an image, for instance, have a bias for each head,
    (W, H, L, L), and after a view a mask for each place, (B, W / B, H, L, L). ``dims`` is the coarsest shape that all of these
    are views of: (B, W / B, H).
    """

    dims: Shape
    split: int  # dims[:split] are the batch, dims[split:] the heads

    @classmethod
    def of(cls, leads: set[Shape], query: Placed, masks: tuple[Placed, ...]) -> "Fold | None":
        """Return the fold that copies the least, or None if some of the shapes ``leads`` are no views of each other."""
        dims = next(iter(leads)) if len(leads) == 1 else _common_refinement(leads)
        if dims is None:
            return None
        folds = [cls(dims, split) for split in range(len(dims) - 1, -1, -1)]
        return folds[0] if len(folds) < 3 else min(folds, key=lambda fold: fold._copied(query, masks))

    def _copied(self, query: Placed, masks: tuple[Placed, ...]) -> int:
        """Estimate how many elements are copied: of the masks, and of query, key, value and output if heads are not apart."""
        heads_stay = query.tensor.is_contiguous() or math.prod(self.dims[self.split :]) == query.lead[-1]
        of_masks = sum(math.prod(self._mask_sizes(self.spread(mask))) for mask in masks)
        return of_masks + (0 if heads_stay else 4 * query.tensor.numel())

    def spread(self, placed: Placed) -> Tensor:
        """Return a view (one size for each of ``dims``, rows, columns)."""
        if placed.lead == self.dims and placed.tensor.dim() == len(placed.lead) + 2:
            return placed.tensor
        *outer, rows, columns = (1,) * (len(placed.lead) + 2 - placed.tensor.dim()) + tuple(placed.tensor.shape)
        sizes: list[int] = []
        for size, full in zip(reversed(outer), reversed(placed.lead)):
            count = 1  # of the elements of this dimension that are covered
            while count < full:
                dim = self.dims[-1 - len(sizes)]
                sizes.append(1 if size == 1 else dim)
                count *= dim
        sizes += [1] * (len(self.dims) - len(sizes))
        return placed.tensor.reshape(*reversed(sizes), rows, columns)

    def fold_query(self, spread: Tensor) -> Tensor:
        """Return (batch, heads, Lq, D)."""
        return self._reshape(spread, self.dims)

    def fold_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value, (batch, key heads, Lk, D or Dv). Queries share heads of them where both are the same."""
        key, value = _unexpanded(key), _unexpanded(value)
        own = 0  # how many of the dimensions of heads, the first ones, tell key heads apart
        heads = len(self.dims) - self.split
        for i in range(heads):
            if key.shape[self.split + i] > 1 or value.shape[self.split + i] > 1:
                own = i + 1
        sizes = (*self.dims[: self.split + own], *(1,) * (heads - own))
        return self._reshape(key, sizes), self._reshape(value, sizes)

    def fold_mask(self, spread: Tensor) -> Tensor:
        """Return (batch or 1, heads or 1, Lq or 1, Lk or 1)."""
        return self._reshape(spread, self._mask_sizes(spread)[:-2])

    def _mask_sizes(self, spread: Tensor) -> Shape:
        """Return spread's sizes, without those of its dimensions that cannot stay 1 because others of their group are not."""
        *outer, rows, columns = spread.shape
        groups = (outer[: self.split], self.dims[: self.split]), (outer[self.split :], self.dims[self.split :])
        sizes = [sizes if all(size == 1 for size in sizes) else full for sizes, full in groups]
        return *sizes[0], *sizes[1], rows, columns

    def _reshape(self, spread: Tensor, sizes: Shape) -> Tensor:
        inner = spread.shape[-2:]
        if len(sizes) == 2 and self.split == 1 and spread.shape[:-2] == sizes:
            return spread
        return spread.expand(*sizes, *inner).reshape(math.prod(sizes[: self.split]), math.prod(sizes[self.split :]), *inner)


def _common_refinement(shapes: Iterable[Shape]) -> Shape | None:
    """Return the coarsest shape of which all ``shapes``, of as many elements, are views by merging neighbours, or None."""
    counts = sorted({math.prod(shape[at:]) for shape in shapes for at in range(len(shape))} - {1})  # of elements from there on
    dims, covered = [], 1
    for count in counts:
        if count % covered:
            return None
        dims.append(count // covered)
        covered = count
    return tuple(reversed(dims)) or (1,)


def _unexpanded(tensor: Tensor) -> Tensor:
    """Return the tensor (*outer, rows, columns) without what expand() repeated along its outer dimensions."""
    strides, sizes = tensor.stride(), tensor.shape
    for dim in range(tensor.dim() - 2):
        if strides[dim] == 0 and sizes[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
