"""The device functions that attention's kernels share: a program's block, ranges, scores, masks, softmax, dropout.

Each pass has a file of its own, and is made of them. All work on tiles of queries by keys. Functions that
take `query` and `key` take the indices of the tile's rows and columns, shaped to broadcast against the tile, so they serve a
transposed tile as well.

Scores are in natural units and are added up as torch adds them. Where a score is a product times a positive scale (SCALE_ONLY),
the kernels use the products themselves. `scoring.factor` turns a difference of scores into an exponent of 2, so that an
exponential is one exp2. No product is fused with a sum unless the code says `fma`: a score minus itself is 0, however large.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .exp2 import exp2_of_fma

LOG2E = tl.constexpr(1.4426950408889634)
HUGE = tl.constexpr(float(1 << 28))  # From this exponent of 2 on, scores that differ do so by 16 or more.
FAR = tl.constexpr(1 << 29)  # Farther than any key. Positions are cut to it: with a window of 2**30, they fit into 32 bits.

# ---- arguments: a kernel takes a tensor with its strides, or values that belong together, as one tuple ----------------------


class Mask(NamedTuple):
    """A mask and its strides, which are 0 where it is broadcast. Floats are added to the scores; a byte of 0 hides a key."""

    data: Any
    batch: int
    head: int
    row: int
    column: int


class BlockList(NamedTuple):
    """Lists of the blocks that a mask leaves something of: for each block of one side, the blocks of the other side."""

    blocks: Any  # int32 (mask's batch, mask's heads, blocks of this side, max_blocks)
    counts: Any  # int32 (mask's batch, mask's heads, blocks of this side): the length of each list
    batch: int  # Stride of counts; 0 where the mask is broadcast.
    head: int  # Stride of counts; 0 where the mask is broadcast.
    max_blocks: int  # The number of blocks of the other side.


class Sizes(NamedTuple):
    """The sizes of a call. With cu_seqlens, batch counts the sequences, and lengths are sums over all of them."""

    batch: int
    heads: int
    group: int  # Number of query heads that share a head of keys.
    q_len: int
    k_len: int
    cu_q: Any  # int32 (batch + 1,), or None
    cu_k: Any  # int32 (batch + 1,), or None
    places: Any  # int64 (batch, 4): position, first_query, first_key and stream of each sequence; None: it is a whole call


class Scoring(NamedTuple):
    """The steps between the products and the softmax. A field that is None is a step that is left out."""

    left: Any  # Query i sees keys from p_i - left to p_i + right, with p_i = i + first_position.
    right: Any
    scale: float
    factor: float  # Exponent of 2 = factor * (score - maximum). It is log2(e), or scale * log2(e) where scores are products.
    power: float  # The smallest power of 2 that is not below factor.
    softcap: Any  # score = softcap * tanh(per_softcap * scale * product)
    per_softcap: Any
    slopes: Any  # float32 (batch, heads) or (heads,)
    slope_batch: int  # Batch stride of slopes; 0 for (heads,).
    sinks: Any  # float32 (heads,)


class Dropout(NamedTuple):
    """Dropout of attention weights: a weight is dropped where its random word is at most `drop_to`."""

    seed: Any  # int64 (1,) or (batch,); None without dropout
    per_example: Any  # True if each example has its own seed, else None.
    drop_to: Any
    keep_scale: Any


# ---- the block of a program: its sequence, head and block -------------------------------------------------------------------


@triton.jit
def program_order(program, heads, blocks, heads_per_group):
    """Return the (head, block) of a program, with `heads` counting those of all examples.

    The last blocks come first, because a causal limit makes them the longest. `heads_per_group` heads, whose K and V fit into
    the L2 cache, are scheduled together.
    """
    heads_per_group = tl.minimum(heads_per_group, heads)  # blocks * heads_per_group is then at most the number of programs
    first = program // (blocks * heads_per_group) * heads_per_group
    size = tl.minimum(heads_per_group, heads - first)
    within = program - first * blocks
    return first + within % size, blocks - 1 - within // size


@triton.jit
def find_sequence(slot, cu_seqlens, batch, BLOCK: tl.constexpr):
    """Return the (sequence, block) of a slot.

    Sequence b owns the slots from cu_seqlens[b] // BLOCK + b on, which are at least as many as its blocks.
    """
    low, high = slot * 0, batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        starts_by = tl.load(cu_seqlens + middle) // BLOCK + middle <= slot
        low = tl.where(starts_by, middle, low)
        high = tl.where(starts_by, high, middle - 1)
    block = slot - (tl.load(cu_seqlens + low) // BLOCK + low)
    return low, tl.minimum(tl.maximum(block, 0), 1 << 23)  # Wrong cu_seqlens still give a valid block.


@triton.jit
def sequence(cu_seqlens, b, total):
    """Return (first row, number of rows) of a sequence. Both stay inside the tensor, whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    last = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total)
    return first, last - first


@triton.jit
def locate(program, heads, length, sizes, cu_seqlens, heads_per_group, BLOCK: tl.constexpr):
    """Return (example, head, block, batch index, first query, queries, first key, keys) of a program.

    `cu_seqlens` belong to the side that is cut into blocks, whose length is `length`. With them, all rows lie in one batch, and
    a block may lie past the end of its sequence.
    """
    if cu_seqlens is None:
        batch_head, block = program_order(program, sizes.batch * heads, tl.cdiv(length, BLOCK), heads_per_group)
        b = batch_head // heads
        return b, batch_head % heads, block, b.to(tl.int64), 0, sizes.q_len, 0, sizes.k_len
    else:
        head, slot = program_order(program, heads, length // BLOCK + sizes.batch, heads_per_group)
        b, block = find_sequence(slot, cu_seqlens, sizes.batch, BLOCK)
        q_first, q_len = sequence(sizes.cu_q, b, sizes.q_len)
        k_first, k_len = sequence(sizes.cu_k, b, sizes.k_len)
        return b, head, block, (b * 0).to(tl.int64), q_first, q_len, k_first, k_len


@triton.jit
def first_position(places, b, q_len, k_len):
    """Return where query 0 of a sequence stands among its keys; query i stands i keys further on."""
    if places is None:
        return k_len - q_len
    else:
        return tl.minimum(tl.maximum(tl.load(places + 4 * b), -FAR), FAR).to(tl.int32)


# ---- ranges: which blocks hold something to see, and which of these need no mask --------------------------------------------


@triton.jit
def seen_range(first, last, length, left, right, BLOCK: tl.constexpr):
    """Return (begin, whole, edge, end): the part of 0..length, in steps of BLOCK, that rows at positions first to last see.

    A row sees from its position - left to its position + right. Every row sees the blocks from `whole` to `edge`. Some rows see
    those from `begin` to `whole` and from `edge` to `end`. No row sees the others.
    """
    begin, end, edge = 0, length, length // BLOCK * BLOCK
    if right is not None:
        end = tl.minimum(length, tl.maximum(last + right + 1, 0))
        edge = tl.minimum(edge, tl.maximum(first + right + 1, 0) // BLOCK * BLOCK)
    whole = 0
    if left is not None:
        begin = tl.maximum(first - left, 0) // BLOCK * BLOCK
        end_of_blocks = tl.cdiv(end, BLOCK) * BLOCK
        whole = tl.cdiv(tl.maximum(last - left, 0), BLOCK) * BLOCK
        whole = tl.maximum(begin, tl.minimum(whole, end_of_blocks))
    return begin, whole, tl.maximum(whole, edge), end


@triton.jit
def block_list(block_lists, b, head, block):
    """Return (pointer to the list of a block, its length); (0, 0) where no mask has made lists."""
    if block_lists is None:
        return 0, 0
    else:
        at = b.to(tl.int64) * block_lists.batch + head * block_lists.head + block
        return block_lists.blocks + at * block_lists.max_blocks, tl.load(block_lists.counts + at)


@triton.jit
def phase_bounds(phase: tl.constexpr, begin, whole, edge, end, count, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the (start, stop) of a phase of the loop.

    Phase 0 is the first edge, phase 1 the inside, which needs no mask, and phase 2 the other edge, or all that is LISTED.
    """
    if LISTED:
        if phase == 2:
            return 0, count * BLOCK
        else:
            return 0, 0
    elif phase == 0:
        return begin, whole
    elif phase == 1:
        return whole, edge
    else:
        return edge, end


@triton.jit
def block_start(block_lists, list_start, step, BLOCK: tl.constexpr):
    """Return the first row of the block of a step: the step itself, or what the list has for it."""
    if block_lists is None:
        return step
    else:
        return tl.load(list_start + step // BLOCK) * BLOCK


# ---- scores -----------------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Return tanh(x) to a few ulps, near 0 too.

    It is (1 - e) / (1 + e) with e = exp(-2 |x|), and a power series for small x.
    """
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    y = x * x
    series = tl.fma(y, -5.70498872745e-3, 2.06390887954e-2)
    series = tl.fma(y, series, -5.37397155531e-2)
    series = tl.fma(y, series, 1.33314422036e-1)
    series = tl.fma(y, series, -3.33332819422e-1)
    return tl.where(tl.abs(x) < 0.625, tl.fma(x, y * series, x), far)


@triton.jit
def slope_of(scoring, b, head):
    """Return the ALiBi slope of a head; 0 without ALiBi."""
    if scoring.slopes is None:
        return 0.0
    else:
        return tl.load(scoring.slopes + b * scoring.slope_batch + head)


@triton.jit
def natural_scores(products, position, key, slope, scoring):
    """Return (scores, softcap_grad, softcap_bend) of a tile: natural scores before the mask, and the softcap's derivatives.

    softcap_grad is the first derivative, 1 without a softcap. The second one is softcap_grad * softcap_bend.
    """
    s = products * scoring.scale
    softcap_grad, softcap_bend = 1.0, 0.0
    if scoring.softcap is not None:
        t = tanh(s * scoring.per_softcap)
        s = t * scoring.softcap
        softcap_grad, softcap_bend = 1.0 - t * t, t * (-2.0 * scoring.per_softcap)
    if scoring.slopes is not None:
        s -= slope * tl.abs(position - key).to(tl.float32)
    return s, softcap_grad, softcap_bend


@triton.jit
def mask_pointers(mask, batch, head, query, key):
    """Return pointers to a tile of a mask."""
    base = mask.data + batch * mask.batch + head.to(tl.int64) * mask.head
    return base + query.to(tl.int64) * mask.row + key.to(tl.int64) * mask.column


@triton.jit
def mask_scores(s, mask, batch, head, position, query, key, queries, keys, left, right):
    """Return the scores with the mask added, and -inf where a key is hidden or where there is no key or no query.

    A float mask is added to natural scores, as torch adds it. The most negative finite number is therefore not like -inf: it
    hides no key.
    """
    seen = (key < keys) & (query < queries)
    if mask is not None:
        pointers = mask_pointers(mask, batch, head, query, key)
        if mask.data.dtype.element_ty == tl.uint8:
            # This adds numbers, because AMD's compiler cannot convert booleans from one layout to another.
            s += tl.where(tl.load(pointers, mask=seen, other=0) != 0, 0.0, float("-inf"))
        else:
            s += tl.load(pointers, mask=seen, other=0.0).to(tl.float32)
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    return tl.where(seen, s, float("-inf"))


# ---- softmax ----------------------------------------------------------------------------------------------------------------


@triton.jit
def online_softmax(s, scoring, row_max, row_sum, MASKED: tl.constexpr, FUSED: tl.constexpr, POLYNOMIAL: tl.constexpr = False):
    """Return (p, new row_max, new row_sum, rescale) of a tile of scores (ROWS, KEYS); rescale corrects earlier partial sums.

    `p` (ROWS, KEYS) holds weights that are not normalized yet. `row_max` and `row_sum` (ROWS,) are those of the keys so far.

    A FUSED weight takes one multiply-add and one exp2. Its exponent is off by `fused_residual`, the same for a whole row.
    Without FUSED, the maximum is subtracted first, so that its own weight is 1, however large it is. POLYNOMIAL weights are
    FUSED ones, a quarter of which are polynomials.
    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    new_max = tl.maximum(row_max, tl.max(s, 1))
    base = exponent_base(new_max, MASKED)
    if POLYNOMIAL:
        factor = fused_factor(base, scoring)
        p = exp2_of_fma(s, factor[:, None], -(base * factor)[:, None])
    else:
        p = tl.exp2(weight_exponents(s, base, scoring, FUSED))
    rescale = tl.exp2(rescale_exponent(row_max, base, scoring, FUSED))
    return p, new_max, tl.fma(row_sum, rescale, tl.sum(p, 1)), rescale


@triton.jit
def exponent_base(row_max, MASKED: tl.constexpr):
    """Return what (ROWS,) to subtract from scores: the maximum, or 0 for a row that may, if MASKED, have seen no key yet."""
    return tl.where(row_max == float("-inf"), 0.0, row_max) if MASKED else row_max


@triton.jit
def weight_exponents(s, base, scoring, FUSED: tl.constexpr):
    """Return the exponents of 2 (ROWS, KEYS) of weights that are not normalized yet, relative to `base` (ROWS,)."""
    if FUSED:
        factor = fused_factor(base, scoring)
        return tl.fma(s, factor[:, None], -(base * factor)[:, None])
    else:
        return (s - base[:, None]) * scoring.factor


@triton.jit
def rescale_exponent(row_max, base, scoring, FUSED: tl.constexpr):
    """Return the exponent of 2 (ROWS,) that takes weights relative to an earlier `row_max` to `base`."""
    if FUSED:
        factor = fused_factor(base, scoring)
        return row_max * factor - base * factor
    else:
        return (row_max - base) * scoring.factor


@triton.jit
def fused_factor(row_max, scoring):
    """Return the factor (ROWS,) of FUSED scores, chosen so that its product with the maximum is rounded by little.

    Where that product is HUGE, a score either is the maximum or lies so far below it that it weighs nothing. A factor that is
    not smaller gives the same weights there, and a power of 2 gives an exact product. Elsewhere the product is off by 8 at
    most, and no weight overflows.
    """
    return tl.where(tl.abs(row_max * scoring.factor) < HUGE, scoring.factor, scoring.power)


@triton.jit
def fused_residual(row_max, scoring):
    """Return by how much (ROWS,) the exponents of FUSED weights are too large: the rounding of the product they subtract."""
    known = tl.where(row_max == float("-inf"), 0.0, row_max)
    factor = fused_factor(known, scoring)
    return tl.fma(known, factor, -(known * factor))


@triton.jit
def finish_softmax(row_max, row_sum, residual, scoring, head, SCALE_ONLY: tl.constexpr):
    """Return (out_scale, lse, log2_sum, sink_weight) of rows (ROWS,), with their sink included.

    out_scale multiplies the weighted sum of values. lse is the log-sum-exp in natural units. log2_sum is log2 of the sum of the
    weights relative to `row_max`. sink_weight is the sink's share of the softmax, 0 without sinks. The exponents of the weights
    are too large by `residual` (ROWS,).

    A row that has seen nothing has a sum of 0 and gives (0, -inf, 0, 0). log2_sum is 0 for any row that has seen no key.
    """
    top = row_max
    if SCALE_ONLY:
        top = row_max * scoring.scale
    keys_scale, sink_weight = 1.0, 0.0
    keys_top = top
    if scoring.sinks is not None:
        sink = tl.load(scoring.sinks + head)
        top = tl.maximum(keys_top, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        keys_scale = tl.exp2((keys_top - base) * LOG2E - residual)
        residual = 0.0
        sink_weight = tl.exp2((sink - base) * LOG2E)  # NaN where the sink is NaN.
        row_sum = row_sum * keys_scale + sink_weight
    empty = row_sum == 0.0
    log2_sum = tl.log2(tl.where(empty, 1.0, row_sum)) - residual
    lse = tl.where(empty, float("-inf"), top + log2_sum / LOG2E)
    if scoring.sinks is not None:
        log2_sum = tl.where(keys_top == float("-inf"), 0.0, log2_sum + (top - keys_top) * LOG2E)
    total = tl.where(empty, 1.0, row_sum)
    return tl.where(empty, 0.0, keys_scale / total), lse, log2_sum, sink_weight / total


# ---- dropout ----------------------------------------------------------------------------------------------------------------


@triton.jit
def dropout_origin(dropout, sizes, b, head):
    """Return (seed, block, query, stream): the seed of an example, and the counter of the first query and key of its head.

    Without places, a head's stream is its number among the heads that share the seed.
    """
    seed, block, query, stream = 0, 0, 0, 0
    if dropout.seed is not None:
        seed = tl.load(dropout.seed if dropout.per_example is None else dropout.seed + b)
        if sizes.places is not None:
            place = sizes.places + 4 * b
            query, block = tl.load(place + 1).to(tl.uint32), (tl.load(place + 2) // 4).to(tl.uint32)
            stream = (tl.load(place + 3) + head).to(tl.uint32)
        else:
            stream = (b * sizes.heads + head if dropout.per_example is None else head).to(tl.uint32)
    return seed, block, query, stream


@triton.jit
def dropout_words(origin, query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Return the random words (QUERIES, KEYS) of a tile of queries (QUERIES,) and of the keys from `first_key` on.

    Key j takes word j % 4 of counter (j // 4, query, 0, 0), counted from that of `dropout_origin`.
    """
    seed, block, first_query, stream = origin
    block += (first_key // 4 + tl.arange(0, KEYS // 4)).to(tl.uint32)[None, :]  # (1, KEYS / 4)
    query = (first_query + query.to(tl.uint32))[:, None]  # (QUERIES, 1)
    zero = tl.zeros([QUERIES, KEYS // 4], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + block, zero + query, zero + stream, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (QUERIES, KEYS / 4, 2, 2): words 0, 1, 2, 3 in the order of memory
    return tl.reshape(words, [QUERIES, KEYS])


@triton.jit
def keep_mask(dropout, origin, query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Return 1.0 for the weights of a tile that stay and 0.0 for those that are dropped.

    The tile is (QUERIES, KEYS), or (KEYS, QUERIES) if KEYS_FIRST. The result is made of numbers, because AMD's compiler cannot
    convert booleans from one layout to another.
    """
    words = dropout_words(origin, query, first_key, QUERIES, KEYS)
    if KEYS_FIRST:
        words = tl.trans(words)
    return tl.where(words > tl.cast(dropout.drop_to, tl.uint32), 1.0, 0.0)
