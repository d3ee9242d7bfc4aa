"""Augmentation of batches in training: pure functions of token ids and a seed."""

import torch
from torch import Tensor


def word_dropout(ids: Tensor, probability: float, mask_id: int, *, seed: int, keep: Tensor | None = None) -> Tensor:
    """Replace each token by ``mask_id`` with this probability, independently of the others.

    Bowman et al. 2016 do so to the decoder's input, so that the decoder must use z.

    Args:
        ids: token ids, an integer tensor of any shape, on any device.
        keep: bool, broadcastable to ``ids``: True at tokens that are never masked, such as padding and the first token.

    Returns:
        A new tensor of the same shape. The same seed gives the same tokens on every device.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    _check(ids, keep)
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be from 0 to 1; got {probability}")
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < probability
    return _masked(ids, drawn, mask_id, keep)[0]


def span_masking(
    ids: Tensor, share: float, mask_id: int, *, seed: int, mean_length: float = 3.0, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replace spans of tokens by ``mask_id``; the lengths of the spans are geometric (after SpanBERT, Joshi et al. 2020).

    A two-state Markov chain runs along each row: an unmasked token follows a masked one with the probability 1 / mean_length,
    and every token is masked with the probability ``share``, wherever it stands.

    Args:
        ids: token ids, an integer tensor (..., length).
        share: the expected share of masked tokens, in [0, 1).
        mean_length: the mean length of a span, in tokens. It must be at least 1 / (1 - share), the mean length that results
            when each token is masked independently.
        keep: as for `word_dropout`. A span that covers such tokens leaves them as they are.

    Returns:
        (masked ids, mask), both of the shape of ``ids``; the mask is bool, True at masked tokens.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    _check(ids, keep)
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1; got {share}")
    if not mean_length >= 1 / (1 - share):
        raise ValueError(f"mean_length must be at least 1 / (1 - share) = {1 / (1 - share):.3g} tokens; got {mean_length}")
    uniform = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stop = 1 / mean_length
    start = stop * share / (1 - share)
    # Each token draws one of three states: masked, unmasked, or like the token before it. The first draws one of the first two.
    masked, unmasked = uniform < start, (uniform >= start) & (uniform < start + stop)
    masked[..., :1] = uniform[..., :1] < share
    unmasked[..., :1] = ~masked[..., :1]
    # `decided` is the position of the last token, up to this one, that drew a state of its own.
    decided = torch.where(masked | unmasked, torch.arange(ids.shape[-1]), 0).cummax(-1).values  # (..., length)
    return _masked(ids, masked.gather(-1, decided), mask_id, keep)


def _check(ids: Tensor, keep: Tensor | None) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not ids.dim():
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an integer tensor of token ids (..., length); got {got}")
    if keep is not None and keep.dtype != torch.bool:
        raise TypeError(f"keep must be a bool tensor; got {keep.dtype}")


def _masked(ids: Tensor, drawn: Tensor, mask_id: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    masked = drawn.to(ids.device)
    if keep is not None:
        masked = masked & ~keep
    return ids.masked_fill(masked, mask_id), masked
