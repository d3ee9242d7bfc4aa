"""Packed sequences: the rows of several texts behind one another, as (1, tokens, hidden), without padding and without a mask.

An attention learns of them in two ways. In place of a mask it gets the bounds of the sequences: from packing.py, which packs
the padded batches of encoders, or from mask.py, where transformers has found positions that begin anew. Or it gets the
arguments of flash attention, ``cu_seq_lens_q`` and ``cu_seq_lens_k``, as from transformers' `DataCollatorWithFlattening`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.attention import varlen_attention

# The dtype of bounds in place of a mask, which no mask has: (B + 1,), as varlen_attention takes them, where all tokens of a
# sequence see each other; or these expanded to (W, B + 1), where a token sees W keys, the last of which is its own. Whoever
# reads W does not wait for a GPU, and a copy keeps it.
PACKED = torch.int32


class Sequences(NamedTuple):
    """Hold the bounds of packed queries and keys, int32 (B + 1,), and what a query sees of its sequence's keys."""

    queries: Tensor
    keys: Tensor
    causal: bool
    window: tuple[int, int | None] | None


def is_packed(mask: Tensor | None) -> bool:
    """Return whether an attention is given the bounds of packed sequences in place of a mask."""
    return mask is not None and mask.dtype is PACKED and mask.dim() <= 2


def causal_bounds(sequence: Tensor, window: int | None) -> Tensor:
    """Return the bounds in place of a causal mask.

    Args:
        sequence: (tokens,), the number of each token's sequence, which does not fall.
        window: how many keys a query sees; None for all before it.
    """
    tokens = sequence.new_tensor([len(sequence)])
    bounds = torch.cat([torch.zeros_like(tokens), sequence.diff().nonzero().flatten() + 1, tokens])
    return bounds.to(PACKED).expand(window or len(sequence), -1)


def sequences_of(bounds: Tensor) -> Sequences:
    """Return the sequences whose bounds stand in place of a mask."""
    if bounds.dim() == 1:
        return Sequences(bounds, bounds, False, None)
    return Sequences(bounds[0], bounds[0], True, (len(bounds) - 1, None))


def attend_packed(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, **options) -> Tensor:
    """Attend within packed sequences. Tensors are (1, H, tokens, D), the output is (1, tokens, H, Dv)."""
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = sequences.window
    if window is not None and window[0] >= key.shape[2] - 1:
        window = None  # It has all keys.
    bounds = sequences.queries, sequences.keys
    return varlen_attention(*packed, *bounds, causal=sequences.causal, window=window, **options).unsqueeze(0)


def as_mask(sequences: Sequences, queries: int, keys: int) -> Tensor:
    """Return the bool mask (1, 1, queries, keys) of packed sequences, True: attend."""
    rows, columns = (torch.arange(length, device=sequences.queries.device) for length in (queries, keys))
    of_query = torch.bucketize(rows, sequences.queries[1:], right=True)
    of_key = torch.bucketize(columns, sequences.keys[1:], right=True)
    # The last query of a sequence is at its last key.
    distance = (columns - sequences.keys[1:][of_key]) - (rows - sequences.queries[1:][of_query])[:, None]
    mask = of_query[:, None] == of_key
    if sequences.causal:
        mask = mask & (distance <= 0)
    if sequences.window is not None:
        mask = mask & (distance >= -sequences.window[0])
    return mask[None, None]
