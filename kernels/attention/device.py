"""The device functions of attention, one idea each: places, ranges, loads, scores, masks, online softmax, dropout.

The passes (forward.py, backward.py, kvcache.py) are made of them. All work on tiles of queries
by keys; those that take `query` and `key` take the indices of the tile's rows and columns, shaped to broadcast against it, and
so serve a transposed tile as well.

Scores are natural ones, added up as torch adds them; or the products themselves, where a score is a product times a positive
scale (PLAIN). `scoring.factor` makes a difference of scores an exponent of 2, so that an exponential is one exp2. No product is
fused with a sum unless `fma` says so: then a score minus itself is 0, however large.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HUGE = tl.constexpr(float(1 << 28))  # an exponent of 2 from which on scores that differ do so by 16 or more

# ---- arguments: a kernel takes a tensor and its strides, or what belongs together, as one -----------------------------------


class Rows(NamedTuple):
    """A (batch, head, row, column) tensor by its strides. Columns are contiguous."""

    data: Any
    batch: int
    head: int
    row: int
    wide: Any  # whether the rows of one tile span 2**31 elements or more; None is no


class Mask(NamedTuple):
    """What is added to the scores, or bytes of which 0 hides a key; the strides along which it is broadcast are 0."""

    data: Any
    batch: int
    head: int
    row: int
    column: int


class Visits(NamedTuple):
    """Which blocks a mask leaves something of: for each block of one side, the numbers of those of the other, and how many."""

    blocks: Any  # int32 (mask's batch, mask's head, blocks of this side, blocks of the other side)
    counts: Any  # int32 (mask's batch, mask's head, blocks of this side)
    batch: int  # strides of counts; 0 where the mask is broadcast
    head: int
    most: int  # blocks of the other side


class Sizes(NamedTuple):
    """Lengths; with cu_seqlens, batch counts the sequences and lengths are those of all of them together."""

    batch: int
    heads: int
    group: int  # query heads that share a head of keys
    q_len: int
    k_len: int
    cu_q: Any  # int32 (batch + 1,), or None
    cu_k: Any


class Scoring(NamedTuple):
    """What happens between the products and the softmax; None is nothing."""

    left: Any  # query i sees keys from p_i - left to p_i + right, with p_i = i + k_len - q_len
    right: Any
    scale: float
    factor: float  # exponent of 2 = factor * (score - maximum): log2(e); scale * log2(e) where scores are products
    power: float  # the smallest power of 2 that is not below it
    softcap: Any  # score = softcap * tanh(per_softcap * scale * product)
    per_softcap: Any
    slopes: Any  # float32 (batch, heads)
    slope_batch: int  # its stride; 0 where the slopes are one for all
    sinks: Any  # float32 (heads,)


class Dropout(NamedTuple):
    """Weights are dropped where the word of the generator is at most `drop_to`; seed is None without dropout."""

    seed: Any  # int64 (1,) or (batch,)
    per_example: Any  # whether each example has its own seed; None is no
    drop_to: Any
    keep_scale: Any


# ---- places: which sequence, head and block a program works on --------------------------------------------------------------


@triton.jit
def in_order(program, units, blocks, together):
    """(unit, block) of a program: last blocks first, which causality makes the longest, `together` units (heads whose keys fit
    into the cache) at a time."""
    together = tl.minimum(together, units)  # blocks * together is then at most the number of programs
    first = program // (blocks * together) * together
    size = tl.minimum(together, units - first)
    within = program - first * blocks
    return first + within % size, blocks - 1 - within // size


@triton.jit
def find_sequence(slot, cu_seqlens, batch, BLOCK: tl.constexpr):
    """(sequence, block) of a slot. Sequence b owns the slots from cu_seqlens[b] // BLOCK + b on, one or more for each block."""
    low, high = slot * 0, batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        starts_by = tl.load(cu_seqlens + middle) // BLOCK + middle <= slot
        low = tl.where(starts_by, middle, low)
        high = tl.where(starts_by, high, middle - 1)
    block = slot - (tl.load(cu_seqlens + low) // BLOCK + low)
    return low, tl.minimum(tl.maximum(block, 0), 1 << 23)  # what wrong cu_seqlens give stays a block


@triton.jit
def sequence(cu_seqlens, b, total):
    """(first row, rows) of a sequence; inside the tensor whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    last = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total)
    return first, last - first


@triton.jit
def place(program, heads, length, sizes, cu_seqlens, together, BLOCK: tl.constexpr):
    """(example, head, block, batch index, first query, queries, first key, keys) of a program.

    cu_seqlens are those of the side that is cut into blocks: then all rows lie in one batch, and a block may lie past the end
    of its sequence.
    """
    if cu_seqlens is None:
        unit, block = in_order(program, sizes.batch * heads, tl.cdiv(length, BLOCK), together)
        b = unit // heads
        return b, unit % heads, block, b.to(tl.int64), 0, sizes.q_len, 0, sizes.k_len
    else:
        head, slot = in_order(program, heads, length // BLOCK + sizes.batch, together)
        b, block = find_sequence(slot, cu_seqlens, sizes.batch, BLOCK)
        q_first, q_len = sequence(sizes.cu_q, b, sizes.q_len)
        k_first, k_len = sequence(sizes.cu_k, b, sizes.k_len)
        return b, head, block, (b * 0).to(tl.int64), q_first, q_len, k_first, k_len


# ---- ranges: which blocks hold something to see, and which of them nothing that is hidden -----------------------------------


@triton.jit
def seen_range(first, last, length, left, right, BLOCK: tl.constexpr):
    """(begin, whole, edge, end): which of 0..length, in steps of BLOCK, rows at places first to last see.

    A row sees from its place - left to its place + right. Blocks from `whole` to `edge` are seen by every row; those from
    `begin` to `whole` and from `edge` to `end` in part; the others not at all.
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
def visit_list(visits, b, head, block):
    """(blocks to visit, how many): of a block's list, where a mask has made lists."""
    if visits is None:
        return 0, 0
    else:
        at = b.to(tl.int64) * visits.batch + head * visits.head + block
        return visits.blocks + at * visits.most, tl.load(visits.counts + at)


@triton.jit
def loop_bounds(phase: tl.constexpr, begin, whole, edge, end, count, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Return (start, stop) of a phase: 0 is an edge, 1 the inside, which needs no mask, 2 the other edge or what is listed."""
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
def visited(visits, visit, step, BLOCK: tl.constexpr):
    """The first row of the block that a step visits."""
    if visits is None:
        return step
    else:
        return tl.load(visit + step // BLOCK) * BLOCK


# ---- loads and stores: (ROWS, COLUMNS) tiles of a tensor whose columns are contiguous ---------------------------------------


@triton.jit
def tile_pointers(rows, batch, head, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Point to (ROWS, COLUMNS) elements, from row `first` on.

    What can exceed 2**31 elements is counted in 64 bits; what lies inside a tile in 32, but for rows that lie far apart.
    """
    base = rows.data + batch * rows.batch + head.to(tl.int64) * rows.head + tl.cast(first, tl.int64) * rows.row
    r = tl.arange(0, ROWS)[:, None]
    if rows.wide is not None:
        r = r.to(tl.int64)
    return base + r * rows.row + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_tile(pointers, rows_left, DIM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """The tile, with zeros past the first `rows_left` rows (where that is checked) and DIM columns."""
    ROWS: tl.constexpr = pointers.shape[0]
    COLUMNS: tl.constexpr = pointers.shape[1]
    columns = tl.arange(0, COLUMNS)[None, :] < DIM
    if CHECK_ROWS:
        rows = tl.arange(0, ROWS)[:, None] < rows_left
        if COLUMNS == DIM:
            return tl.load(pointers, mask=rows, other=0.0)
        else:
            return tl.load(pointers, mask=rows & columns, other=0.0)
    elif COLUMNS == DIM:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=columns, other=0.0)


@triton.jit
def load_block(
    pointers, rows, tiles, batch, head, first, within, rows_left, DIM: tl.constexpr, CHECK_ROWS: tl.constexpr
):  # fmt: skip
    """The tile from row `within` on of those that begin at `first`, where `pointers` point, with zeros as in `load_tile`.

    `tiles` is a descriptor of (1, 1, ROWS, COLUMNS) blocks of the tensor, by which the GPU's tensor memory accelerator copies a
    tile and fills up with zeros past the tensor's end; or None.
    """
    if tiles is None:
        return load_tile(pointers + tl.cast(within, tl.int64) * rows.row, rows_left, DIM, CHECK_ROWS)
    else:
        return tiles.load([batch.to(tl.int32), head, first + within, 0]).reshape(pointers.shape)


@triton.jit
def store_tile(pointers, values, rows_left, DIM: tl.constexpr):
    inside = (tl.arange(0, pointers.shape[0])[:, None] < rows_left) & (tl.arange(0, pointers.shape[1])[None, :] < DIM)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


# ---- scores -----------------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """To a few ulps, near 0 too: (1 - e) / (1 + e) with e = exp(-2 |x|); for small x by its series."""
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
    """Load the head's ALiBi slope."""
    if scoring.slopes is None:
        return 0.0
    else:
        return tl.load(scoring.slopes + b * scoring.slope_batch + head)


@triton.jit
def scores(products, place, key, slope, scoring):
    """Return the natural scores of a tile before a mask, and the derivative of the softcap, 1 where there is none."""
    s = products * scoring.scale
    derivative = 1.0
    if scoring.softcap is not None:
        t = tanh(s * scoring.per_softcap)
        s = t * scoring.softcap
        derivative = 1.0 - t * t
    if scoring.slopes is not None:
        s -= slope * tl.abs(place - key).to(tl.float32)
    return s, derivative


@triton.jit
def masked(s, mask, batch, head, place, query, key, queries, keys, left, right):
    """Return the scores with the mask added, and -inf where a key is hidden or is none.

    A float mask is added to natural scores, as torch adds it: the most negative finite number hides no key from -inf's like.
    """
    seen = (key < keys) & (query < queries)
    if mask is not None:
        base = mask.data + batch * mask.batch + head.to(tl.int64) * mask.head
        pointers = base + query.to(tl.int64) * mask.row + key.to(tl.int64) * mask.column
        if mask.data.dtype.element_ty == tl.uint8:
            # Numbers, as AMD's compiler cannot bring bits from one layout into another.
            s += tl.where(tl.load(pointers, mask=seen, other=0) != 0, 0.0, float("-inf"))
        else:
            s += tl.load(pointers, mask=seen, other=0.0).to(tl.float32)
    if left is not None:
        seen &= key >= place - left
    if right is not None:
        seen &= key <= place + right
    return tl.where(seen, s, float("-inf"))


# ---- softmax ----------------------------------------------------------------------------------------------------------------


@triton.jit
def online_softmax(s, scoring, maximum, total, MASKED: tl.constexpr, FUSED: tl.constexpr):
    """Return (weights, new maximum, new total, rescale) of a tile of scores (ROWS, KEYS); rescale corrects earlier sums.

    `maximum` and `total` (ROWS,) are those of the keys so far. A FUSED weight takes one multiply-add and one exp2; its exponent
    is off by `fused_residual`, the same for a whole row. Else the maximum is subtracted first: its own weight is 1, however
    large it is. Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    new = tl.maximum(maximum, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new  # a row that has seen nothing yet has no maximum
    if FUSED:
        factor = fused_factor(base, scoring)
        weights = tl.exp2(tl.fma(s, factor[:, None], -(base * factor)[:, None]))
        rescale = tl.exp2(maximum * factor - base * factor)
    else:
        weights = tl.exp2((s - base[:, None]) * scoring.factor)
        rescale = tl.exp2((maximum - base) * scoring.factor)
    return weights, new, tl.fma(total, rescale, tl.sum(weights, 1)), rescale


@triton.jit
def fused_factor(maximum, scoring):
    """Return what the scores of rows (ROWS,) are multiplied by, so that the product with the maximum is not far from rounded.

    Where that product is HUGE, a score is the maximum, or so far below it that it weighs nothing: another factor, not smaller,
    gives the same weights, and a power of 2 an exact product. Elsewhere it is off by 8 at most, and no weight overflows.
    """
    return tl.where(tl.abs(maximum * scoring.factor) < HUGE, scoring.factor, scoring.power)


@triton.jit
def fused_residual(maximum, scoring):
    """Return by how much the exponents of FUSED weights are too large: the rounding of the product that they subtract."""
    known = tl.where(maximum == float("-inf"), 0.0, maximum)
    factor = fused_factor(known, scoring)
    return tl.fma(known, factor, -(known * factor))


@triton.jit
def finish_softmax(maximum, total, residual, scoring, head, PLAIN: tl.constexpr):
    """Return (out_scale, lse, log2_total) of rows (ROWS,), their sink included.

    out_scale is what the weighted sum of values is multiplied by, lse the log-sum-exp in natural units, and log2_total log2 of
    the total of the weights relative to `maximum`. The exponents of the weights are too large by `residual` (ROWS,).
    A row that has seen nothing has a total of 0 and gives (0, -inf, 0); a log2_total is 0 where no key was seen.
    """
    top = maximum
    if PLAIN:
        top = maximum * scoring.scale
    of_keys = 1.0
    keys_top = top
    if scoring.sinks is not None:
        sink = tl.load(scoring.sinks + head)
        top = tl.maximum(keys_top, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        of_keys = tl.exp2((keys_top - base) * LOG2E - residual)
        residual = 0.0
        total = total * of_keys + tl.exp2((sink - base) * LOG2E)  # NaN where the sink is
    empty = total == 0.0
    log2_total = tl.log2(tl.where(empty, 1.0, total)) - residual
    lse = tl.where(empty, float("-inf"), top + log2_total / LOG2E)
    if scoring.sinks is not None:
        log2_total = tl.where(keys_top == float("-inf"), 0.0, log2_total + (top - keys_top) * LOG2E)
    return tl.where(empty, 0.0, of_keys / tl.where(empty, 1.0, total)), lse, log2_total


# ---- dropout ----------------------------------------------------------------------------------------------------------------


@triton.jit
def dropout_stream(dropout, b, head, heads):
    """(seed, number of the head in its stream)."""
    if dropout.seed is None:
        return 0, 0
    elif dropout.per_example is None:
        return tl.load(dropout.seed), b * heads + head
    else:
        return tl.load(dropout.seed + b), head


@triton.jit
def dropout_words(seed, stream, query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """(QUERIES, KEYS) words of the generator: key j's is word j % 4 of counter (j // 4, query, stream, 0)."""
    block = (first_key // 4 + tl.arange(0, KEYS // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros([QUERIES, KEYS // 4], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + block, zero + query.to(tl.uint32)[:, None], zero + stream.to(tl.uint32), zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (QUERIES, KEYS / 4, 2, 2): words 0, 1, 2, 3 in the order of memory
    return tl.reshape(words, [QUERIES, KEYS])


@triton.jit
def kept(dropout, seed, stream, query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """1.0 for the weights of a tile that stay, 0.0 for the others; KEYS_FIRST: of a transposed one.

    Numbers, as AMD's compiler cannot bring bits from one layout into another.
    """
    words = dropout_words(seed, stream, query, first_key, QUERIES, KEYS)
    if KEYS_FIRST:
        words = tl.trans(words)
    return tl.where(words > tl.cast(dropout.drop_to, tl.uint32), 1.0, 0.0)
