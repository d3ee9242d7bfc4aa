"""What the steps of hand-written attention amount to, and the one call of attention that does the same."""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.attention import attention, has_kernel
from ...ops.attention.fill import FillCall, fill
from ...ops.torch_op import is_ordinary
from .fold import Fold, Placed, Shape
from .masks import Bias, Hidden, Mask, merged_mask

MAX_HEAD_DIM = 256  # A product of longer vectors is hardly one of queries and keys.
_LEAST_FILL = -1e3  # A fill above it may be a score like any other.


class Chain(NamedTuple):
    """Scores ``scale * factors * (query @ key.mT) + biases``, the hidden ones replaced by ``fill``; or their softmax.

    Each method returns the chain after one more step, or None if that step is none of attention's.
    """

    query: Tensor  # (*lead, Lq, D)
    key: Tensor  # (*lead, Lk, D); the leading dimensions of the two broadcast
    lead: Shape  # the leading dimensions of their product
    shape: Shape  # (*lead, Lq, Lk), where views may since have split or merged the leading dimensions
    dtype: torch.dtype
    scale: float = 1.0
    factors: tuple[Placed, ...] = ()  # each the same for all queries and keys of a head
    biases: tuple[Bias, ...] = ()
    hidden: tuple[Hidden, ...] = ()
    fill: float = -math.inf
    fill_is_even: bool = True  # whether nothing has been added to it
    is_softmax: bool = False
    hidden_weights_are_zero: bool = False  # also in rows that are hidden whole
    dropout_p: float = 0.0
    is_averaged: bool = False  # over heads, for somebody who looks at the weights

    def times(self, factor: float | Tensor) -> "Chain | None":
        """Multiply the scores by a number, or by a tensor (*lead, 1, 1), such as a learned temperature of each head."""
        if self.is_softmax:
            return None
        if isinstance(factor, Tensor):
            exact = self.dtype == factor.dtype == torch.float32 and not self.biases and not self.hidden
            if not exact or not _broadcasts(factor.shape, (*self.shape[:-2], 1, 1)):
                return None
            return self._replace(factors=(*self.factors, Placed(factor, self.shape[:-2])))
        if not 1e-30 < abs(factor) < 1e30 or (self.hidden and factor < 0.0):
            return None
        biases = tuple(bias._replace(factor=bias.factor * factor) for bias in self.biases)
        return self._replace(scale=self.scale * factor, biases=biases, fill=self.fill * factor)

    def plus(self, bias: Tensor, factor: float = 1.0) -> "Chain | None":
        """Add ``factor * bias`` to the scores, and to what has been filled into them."""
        if self.is_softmax or not bias.is_floating_point() or not _broadcasts(bias.shape, self.shape):
            return None
        dtype = torch.promote_types(self.dtype, bias.dtype) if bias.dim() else self.dtype
        biases = (*self.biases, Bias(Placed(bias, self.shape[:-2]), factor))
        return self._replace(biases=biases, dtype=dtype, fill_is_even=self.fill_is_even and not self.hidden)

    def hide(self, condition: Tensor, where: bool, fill: float) -> "Chain | None":
        """Replace the scores where ``condition`` is ``where``; or write zeros once more over the weights of hidden scores."""
        if condition.dtype != torch.bool or not _broadcasts(condition.shape, self.shape):
            return None
        hidden = Hidden(Placed(condition, self.shape[:-2]), where)
        if self.is_softmax:
            once_more = fill == 0.0 and not self.dropout_p and len(self.hidden) == 1 and self.hidden[0].is_same(hidden)
            return self._replace(hidden_weights_are_zero=True) if once_more else None
        fits = fill == -math.inf or torch.finfo(self.dtype).min <= fill <= _LEAST_FILL
        if not fits or (self.hidden and (fill != self.fill or not self.fill_is_even)):
            return None
        return self._replace(hidden=(*self.hidden, hidden), fill=fill)

    def softmax(self, dim: int, dtype: torch.dtype) -> "Chain | None":
        """Turn the scores into weights of that dtype."""
        over_keys = dim in (-1, len(self.shape) - 1)
        return self._replace(is_softmax=True, dtype=dtype) if over_keys and not self.is_softmax else None

    def dropout(self, p: float) -> "Chain | None":
        """Drop weights."""
        fits = self.is_softmax and not self.dropout_p and 0.0 < p <= 1.0
        return self._replace(dropout_p=p) if fits else None

    def cast(self, dtype: torch.dtype) -> "Chain | None":
        """Convert scores or weights to another dtype."""
        return self._replace(dtype=dtype) if dtype.is_floating_point else None

    def view(self, shape: Shape) -> "Chain | None":
        """See the leading dimensions, or averaged weights, in another shape of as many elements."""
        keeps_scores = len(shape) > 2 and shape[-2:] == self.shape[-2:]
        return self._replace(shape=shape) if keeps_scores or self.is_averaged else None

    def average(self, dim: int) -> "Chain | None":
        """Average the weights (batch, heads, Lq, Lk) over heads."""
        if not self.is_softmax or len(self.shape) != 4 or dim not in (1, -3):
            return None
        return self._replace(shape=(self.shape[0], *self.shape[2:]), is_averaged=True)

    # ---- the call -----------------------------------------------------------------------------------------------------------

    def why_not(self, value: Tensor) -> str | None:
        """Return why the product of the weights and ``value`` (*lead, Lk, Dv) is no call of attention, or None."""
        if not self.is_softmax or self.is_averaged:
            return "hand-written scores met a value before their softmax"
        if value.shape[-2] != self.shape[-1] or not _broadcasts(value.shape[:-2], self.shape[:-2]):
            return "the values do not fit hand-written weights"
        if value.dtype != self.dtype and not torch.is_autocast_enabled(value.device.type):
            return "the values have another dtype than hand-written weights"
        if value.shape[-1] > MAX_HEAD_DIM or (value.dtype is not self.query.dtype and not has_kernel(value, value)):
            return f"no kernel takes values of {value.dtype} and {value.shape[-1]} elements on {value.device}"
        return None

    def attend(self, value: Tensor, seed: Tensor | None) -> Tensor | None:
        """Return the product with ``value``, (*lead, Lq, Dv), contiguous; or None if this is no way to compute it exactly."""
        lead = self.shape[:-2]
        if not self.factors and not self.biases and not self.hidden and len(lead) == 2 and self._fits(value):
            query, key, mask = self.query, self.key, Mask(None, False, None)
        else:
            masks = *(bias.placed for bias in self.biases), *(hidden.placed for hidden in self.hidden)
            query = Placed(self.query, self.lead)
            fold = Fold.of({self.lead, lead, *(placed.lead for placed in (*self.factors, *masks))}, query, masks)
            if fold is None:
                return None
            query = fold.spread(query)
            for factor in self.factors:
                query = query * fold.spread(factor)
            query = fold.fold_query(query)
            key, value = fold.fold_keys(fold.spread(Placed(self.key, self.lead)), fold.spread(Placed(value, lead)))
            mask = merged_mask(fold, self.biases, self.hidden, self.shape[-2:])
        device = value.device.type
        autocast = torch.is_autocast_enabled(device)  # It casts the operands of products. Masks keep their precision.
        dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(query.dtype, value.dtype)
        out_dtype = dtype if autocast else value.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        options = {"mask": mask.mask, "causal": mask.causal, "scale": self.scale, "dropout_p": self.dropout_p, "seed": seed}
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            if not self.hidden or self.fill == -math.inf:
                out = attention(query, key, value, **options)
            else:
                out = self._attend_with_finite_fill(query, key, value, mask.attended, options)
        if out is None:
            return None
        out = out.to(out_dtype).contiguous()
        return out if len(lead) == 2 and out.shape[:2] == lead else out.view(*lead, *out.shape[-2:])

    def _fits(self, value: Tensor) -> bool:
        """Tell whether query, key and value are (batch, heads, ...) as they are."""
        return self.query.shape[:-2] == self.key.shape[:-2] == value.shape[:-2] == self.lead == self.shape[:-2]

    def _attend_with_finite_fill(
        self, query: Tensor, key: Tensor, value: Tensor, attended: Tensor | None, options: dict
    ) -> Tensor | None:
        """Give rows that are hidden whole the mean of all values, as they get it in torch: their scores are all the fill.

        Return None if in another row hidden scores may count beside the others. e^-104 is 0 in float32. To know it, the CPU
        waits for a GPU, which it must not do while a graph is captured.
        """
        if not is_ordinary(value):
            return self._attend_with_finite_fill_in_graph(query, key, value, attended, options)
        if value.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        out, lse = attention(query, key, value, **options, return_lse=True)
        raised = sum(max(0.0, float((bias.placed.tensor.detach() * bias.factor).max())) for bias in self.biases)
        alone = lse > self.fill + raised + 104.0 + math.log(key.shape[2])
        if bool(alone.all()):
            return out
        if attended is None or not self.fill_is_even or (self.dropout_p and not self.hidden_weights_are_zero):
            return None
        whole = attended.any(-1).logical_not()  # (B or 1, Hq or 1, Lq or 1)
        if not bool((alone | whole).all()):
            return None
        if self.hidden_weights_are_zero:
            return out
        mean = value.mean(-2, keepdim=True).repeat_interleave(out.shape[1] // value.shape[1], dim=1)  # (B, Hq, 1, Dv)
        return torch.where(whole.unsqueeze(-1), mean.to(out.dtype), out)

    def _attend_with_finite_fill_in_graph(
        self, query: Tensor, key: Tensor, value: Tensor, attended: Tensor | None, options: dict
    ) -> Tensor | None:
        """Do the same while torch.compile traces, when there are no numbers to decide by: an op decides later."""
        if attended is None or not self.fill_is_even:
            return None
        out, lse = attention(query, key, value, **options, return_lse=True)
        mask = options["mask"] if self.biases else None
        inputs = out, query, key, value, mask, attended, lse.detach(), options["seed"]
        return fill(FillCall(*inputs, self.scale, self.fill, self.dropout_p, self.hidden_weights_are_zero))


def _broadcasts(shape: Shape, to: Shape) -> bool:
    """Tell whether ``shape`` broadcasts to exactly ``to``."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to)))
