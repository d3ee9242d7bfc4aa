"""Drop weights outside of a kernel, as one that draws from the same seed drops them."""

import math

from torch import Tensor

from ...reference.attention import keep_mask, keep_scale


def drop(weights: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Return the weights (*lead, Lq, Lk) after the dropout of a call of attention whose batches and heads are ``lead``."""
    *lead, rows, keys = weights.shape
    kept = keep_mask(seed, dropout_p, 1, math.prod(lead), rows, keys, device=weights.device).view(weights.shape)
    return weights.masked_fill(kept.logical_not(), 0.0) * keep_scale(dropout_p)
