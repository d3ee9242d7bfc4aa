"""Take padding out of batches and put it back, by the functions of flash_attn.bert_padding."""

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Return rows ``indices`` (n,) of ``input`` (rows, ...), with a gradient."""
    assert input.ndim >= 2
    return input[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return zeros (first_axis_dim, ...) with ``values`` (n, ...) in the rows ``indices`` (n,), with a gradient."""
    assert indices.ndim == 1
    assert values.ndim >= 2
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return `index_first_axis` and the input itself."""
    return index_first_axis(input, indices), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Take the tokens out of a padded batch.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or integer: 1 is a token, 0 is padding.
        unused_mask: (B, S), likewise: places that are kept although they hold no token.

    Returns:
        The tokens (total, ...), their places in B * S (total,), cu_seqlens int32 (B + 1,), the longest length, and how many
        tokens each sequence has without the unused places, int32 (B,).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths, used = (mask.sum(dim=-1, dtype=torch.int32) for mask in (kept, attention_mask))
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _cu_seqlens(lengths), lengths.max().item(), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Take the tokens out of a batch whose rows hold several sequences each.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: (B, S), integer: the lengths of a row's sequences, and then zeros. [[2, 3, 0, 0, 0, 0]] are
            two sequences, of 2 and of 3 tokens, and one place of padding.

    Returns:
        The tokens (total, ...), their places in B * S (total,), cu_seqlens int32 (sequences + 1,), and the longest length.
    """
    tokens_of_row = attention_mask_in_length.sum(dim=-1)  # (B,)
    place = torch.arange(attention_mask_in_length.shape[-1], device=tokens_of_row.device)
    indices = (place < tokens_of_row[:, None]).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _cu_seqlens(lengths), lengths.max().item()


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Return a batch (batch, seqlen, ...) of tokens (total, ...) at their ``indices``, and of zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _cu_seqlens(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
