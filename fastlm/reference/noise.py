"""Draw the noise of fastlm in plain PyTorch, by Philox4x32-10 and Box-Muller.

Philox is counter-based (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11): block ``c`` of the
stream of a seed is a pure function of the two. So anyone can draw any element at any time, and the backward draws the
forward's noise again instead of storing it. The layout is that of ``torch.func._random.normal`` with key ``[seed, 0]``.
"""

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # Digits of the golden ratio and of sqrt(3) - 1.
LOW = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words for a counter of four words, with the key ``seed`` (int64, read as a 64-bit pattern).

    All tensors are int64 and broadcast against each other. The words, given and returned, are in [0, 2**32).
    """
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        # A product of two 32-bit words may wrap past 2**63; its bits are right all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """Return (word + 1/2) / 2**32, rounded to float32: in (0, 1], never 0, so that its logarithm is finite."""
    return (word.to(torch.float32) + 0.5) * 2.0**-32


def normal(seed: Tensor, position: Tensor) -> Tensor:
    """Return float32 standard normals at ``position`` (int64, any shape) of the streams of ``seed`` (int64, broadcastable).

    Block c holds elements 4c to 4c + 3. Words 0 and 2 give the radii of two Box-Muller pairs, words 1 and 3 their angles; each
    pair yields its cosine first, then its sine. The uniforms are float32 by definition; the rest is computed in float64 and
    rounded once, so that there is one right answer for every backend.
    """
    block = position >> 2
    zero = torch.zeros_like(block)
    words = philox(seed, block & LOW, (block >> 32) & LOW, zero, zero)
    second_pair, second_of_pair = (position & 2).bool(), (position & 1).bool()
    u = uniform(torch.where(second_pair, words[2], words[0])).double()
    turn = uniform(torch.where(second_pair, words[3], words[1])).double()
    radius = torch.sqrt(-2.0 * torch.log(u))
    angle = 2.0 * math.pi * turn
    return (radius * torch.where(second_of_pair, torch.sin(angle), torch.cos(angle))).float()


def normal_like(x: Tensor, seed: Tensor, num_samples: int = 1, first: int = 0, sample_stride: int | None = None) -> Tensor:
    """Return the noise of ``num_samples`` draws for a tensor shaped like ``x``: float32 (num_samples, *x.shape).

    ``seed`` is 0-d, or has the shape of leading dimensions of ``x``: (B,) gives each example a stream of its own. Sample k of
    element e (counted in row-major order within its stream) sits at position first + k * sample_stride + e. The stride is the
    number of x's elements in a stream; if x is a part of a larger tensor, it is that one's.
    """
    streams = seed.numel()
    length = x.numel() // max(1, streams)
    element = torch.arange(length, device=x.device)
    sample = torch.arange(num_samples, device=x.device)
    position = first + sample[:, None, None] * (sample_stride or length) + element  # (K, 1, length)
    return normal(seed.reshape(1, -1, 1), position.expand(-1, streams, -1)).reshape(num_samples, *x.shape)
