"""Augmentation of batches at training time: pure functions of token ids and a seed."""

import torch
from torch import Tensor


def word_dropout(ids: Tensor, probability: float, mask_id: int, *, seed: int, keep: Tensor | None = None) -> Tensor:
    """Each token becomes ``mask_id`` with this probability, by itself (Bowman et al. 2016, for decoders that must use z).

    Args:
        ids: token ids, an integer tensor of any shape, on any device.
        keep: bool, broadcastable to ``ids``: tokens that stay, such as padding and the first.

    Returns:
        A new tensor. The same seed gives the same tokens on every device.

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
    """Spans of tokens become ``mask_id``s (after SpanBERT, Joshi et al. 2020), with geometric lengths.

    A two-state Markov chain along a row: a masked token is followed by an unmasked one with the probability 1 / mean_length,
    and every token is masked with the probability ``share``, wherever it stands.

    Args:
        ids: token ids, an integer tensor (..., length).
        share: of the tokens to mask, in [0, 1).
        mean_length: of the spans, in tokens; at least 1 / (1 - share), which tokens have that are masked each by itself.
        keep: as for `word_dropout`; a span that meets such tokens leaves them as they are.

    Returns:
        (the masked ids, bool of the same shape: True where masked).

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
    # each token draws whether it is masked, is not, or is as the one before it; the first is not given the choice
    masked, unmasked = uniform < start, (uniform >= start) & (uniform < start + stop)
    masked[..., :1] = uniform[..., :1] < share
    unmasked[..., :1] = ~masked[..., :1]
    decided = torch.where(masked | unmasked, torch.arange(ids.shape[-1]), 0).cummax(-1).values  # the last that drew for itself
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
