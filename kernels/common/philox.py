"""The generator of csrc/common/philox.h, Philox4x32-10 and Box-Muller, with the same integers and normals of the same bits.

The stream of a seed: key = seed (64 bits), counter = block (64 bits) and 64 zero bits. Block c holds elements 4c to 4c + 3.
Words 0 and 2 give the radii of two Box-Muller pairs, words 1 and 3 their angles; each pair yields the cosine first, the sine
second.
"""

import triton
import triton.language as tl

from .math import constant, log_unit, sincos_turn


@triton.jit
def philox_block(seed, block):
    """Return the four words, uint32 (N,) each, of blocks, uint64 (N,), of the streams of seed, int64, a scalar or (N,)."""
    low = block.to(tl.uint32)
    zero = tl.zeros(low.shape, tl.uint32)
    return tl.philox(seed, low, (block >> 32).to(tl.uint32), zero, zero)


@triton.jit
def unit(word):
    """Return (word + 1/2) / 2^32, rounded to float32: in (0, 1], never 0."""
    x = word.to(tl.float32)
    return tl.fma(x, constant(2.0**-32, x), constant(2.0**-33, x))


@triton.jit
def box_muller(radius_word, angle_word):
    """Return two standard normals, float32 (N,) each: the cosine and the sine."""
    radius = tl.sqrt_rn(-2.0 * log_unit(unit(radius_word)))
    sine, cosine = sincos_turn(unit(angle_word))
    return radius * cosine, radius * sine


@triton.jit
def normal_blocks(seed, block):
    """Return the normals, float32 (4 N,), of blocks, uint64 (N,): four neighbours from each."""
    w0, w1, w2, w3 = philox_block(seed, block)
    cosine_0, sine_0 = box_muller(w0, w1)
    cosine_1, sine_1 = box_muller(w2, w3)
    normals = tl.join(tl.join(cosine_0, cosine_1), tl.join(sine_0, sine_1))  # (N, pair, cosine or sine)
    return tl.reshape(normals, [4 * block.shape[0]])


@triton.jit
def normals_at(seed, position):
    """Return the normals, float32 (N,), at positions, uint64 (N,), of which each takes a block of its own."""
    w0, w1, w2, w3 = philox_block(seed, position >> 2)
    second_pair, second_of_pair = (position & 2) != 0, (position & 1) != 0
    cosine, sine = box_muller(tl.where(second_pair, w2, w0), tl.where(second_pair, w3, w1))
    return tl.where(second_of_pair, sine, cosine)
