"""The device functions for statistics of attention's weights: what the forward adds up of a row, and what the backward adds.

With weights p = 2^x / sum 2^x, of exponents x relative to the running maximum, a row's entropy needs one more sum than its
softmax, that of 2^x x:

    entropy = ln 2 (log2(sum 2^x) - sum 2^x x / sum 2^x)

Both terms are at least 0, so that nothing cancels. When the maximum rises by m, the exponents fall by m.
Cotangents e of the entropy, h of the largest logit and c of the keys' mass add to the gradient of a score

    p_ij (c_j - e_i log p_ij - (sum_k p_ik c_k + e_i entropy_i)) + h_i [j is the key that has the largest logit]

of which delta holds the part that is one number for a row. The mass has passes of its own (key_mass.py).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import LOG2E, exponent_base, rescale_exponent, weight_exponents

LOWEST = tl.constexpr(-1000.0)  # 2 to a lower exponent is 0, and 0 times a finite exponent is 0, too.
NO_KEY = tl.constexpr(2**31 - 1)


class RowStats(NamedTuple):
    """Where the forward writes the statistics of its rows, each (batch, heads, rows)."""

    entropy: Any  # float32, in nats
    max_logit: Any  # float32
    max_key: Any  # int32: the first key that has the largest logit; -1 where a row sees none


class StatsGrads(NamedTuple):
    """The gradients of the statistics. A field that is None counts as zeros."""

    entropy: Any  # float32 (batch, heads, rows)
    max_logit: Any  # float32 (batch, heads, rows)
    max_key: Any  # int32 (batch, heads, rows); None without max_logit
    key_mass: Any  # float32 (batch, heads, keys)


# ---- the forward ------------------------------------------------------------------------------------------------------------


@triton.jit
def online_row_stats(
    s, p, rescale, key, scoring, old_max, row_max, old_sum, weighted, max_key, MASKED: tl.constexpr, FUSED: tl.constexpr
):  # fmt: skip
    """Return the new (weighted, max_key) (ROWS,) of a tile that `online_softmax` has taken in.

    `weighted` is the sum of the weights times their exponents, of the keys so far. `old_max` and `old_sum` are those before the
    tile, `row_max` is the one after it. `key` (1, KEYS) holds the indices of the tile's keys.
    """
    base = exponent_base(row_max, MASKED)
    exponents = tl.maximum(weight_exponents(s, base, scoring, FUSED), LOWEST)  # (ROWS, KEYS)
    moved = tl.maximum(rescale_exponent(old_max, base, scoring, FUSED), LOWEST)  # (ROWS,), at most 0
    weighted = rescale * tl.fma(moved, old_sum, weighted) + tl.sum(p * exponents, 1)
    first = tl.min(tl.where(s == row_max[:, None], key, NO_KEY), 1)
    return weighted, tl.where(row_max > old_max, first, max_key)


@triton.jit
def finish_row_stats(
    row_max, row_sum, weighted, out_scale, log2_sum, sink_weight, residual, scoring, SCALE_ONLY: tl.constexpr
):  # fmt: skip
    """Return (entropy, max_logit) (ROWS,) from the loop's sums and from what `finish_softmax` returned."""
    share = row_sum * out_scale  # The keys' share of the weights: all but the sink's.
    entropy = (log2_sum + residual) * share - weighted * out_scale
    entropy = tl.where(share == 0.0, 0.0, entropy)  # Far below a sink, log2_sum may be inf.
    if scoring.sinks is not None:
        entropy -= sink_weight * tl.log2(tl.where(sink_weight == 0.0, 1.0, sink_weight))
    entropy = tl.maximum(entropy / LOG2E, 0.0, propagate_nan=tl.PropagateNan.ALL)
    max_logit = row_max
    if SCALE_ONLY:
        max_logit *= scoring.scale
    # A maximum passes NaN by, but the sum does not. It is NaN beside inf, too.
    is_nan = (row_sum != row_sum) & (row_max != float("inf"))
    return entropy, tl.where(is_nan, float("nan"), max_logit)


@triton.jit
def store_row_stats(row_stats, row, inside, entropy, max_logit, max_key):
    """Store the statistics (ROWS,) of the rows that lie inside."""
    tl.store(row_stats.entropy + row, entropy, mask=inside)
    tl.store(row_stats.max_logit + row, max_logit, mask=inside)
    tl.store(row_stats.max_key + row, max_key, mask=inside)


# ---- the backward -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_row_grads(stats, first_row, rows_left, ROWS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Return (grad_entropy, grad_max_logit, max_key) of ROWS rows from `first_row` on, 0 for what is None.

    They broadcast against a tile (ROWS, KEYS), or (KEYS, ROWS) if KEYS_FIRST. grad_entropy is that of an entropy in bits.
    """
    r = tl.arange(0, ROWS)
    inside = r < rows_left
    grad_entropy, grad_max_logit, max_key = 0.0, 0.0, 0
    if stats is not None:
        if stats.entropy is not None:
            loaded = tl.load(stats.entropy + first_row + r, mask=inside, other=0.0) / LOG2E  # (ROWS,)
            grad_entropy = loaded[None, :] if KEYS_FIRST else loaded[:, None]
        if stats.max_logit is not None:
            loaded = tl.load(stats.max_logit + first_row + r, mask=inside, other=0.0)
            grad_max_logit = loaded[None, :] if KEYS_FIRST else loaded[:, None]
            keys = tl.load(stats.max_key + first_row + r, mask=inside, other=-1)
            max_key = keys[None, :] if KEYS_FIRST else keys[:, None]
    return grad_entropy, grad_max_logit, max_key


@triton.jit
def load_key_grads(stats, first_key, keys_left, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Return grad_key_mass of KEYS keys from `first_key` on, to broadcast as in `load_row_grads`; 0 if it is None."""
    if stats is None or stats.key_mass is None:
        return 0.0
    else:
        k = tl.arange(0, KEYS)
        grad_key_mass = tl.load(stats.key_mass + first_key + k, mask=k < keys_left, other=0.0)  # (KEYS,)
        return grad_key_mass[:, None] if KEYS_FIRST else grad_key_mass[None, :]


@triton.jit
def score_grads(dp, p, log2_p, delta, key, stats, row_grads, grad_key_mass):
    """Return the gradients of a tile's scores, after the softcap, from those of its weights.

    `delta`, `key`, the indices of the keys, and what the two functions above return broadcast against the tile.
    """
    by_weight = dp - delta
    if stats is None:
        return p * by_weight
    else:
        grad_entropy, grad_max_logit, max_key = row_grads
        if stats.key_mass is not None:
            by_weight += grad_key_mass
        if stats.entropy is not None:
            by_weight -= grad_entropy * tl.maximum(log2_p, LOWEST)
        ds = p * by_weight
        if stats.max_logit is not None:
            ds += tl.where(key == max_key, grad_max_logit, 0.0)
        return ds
