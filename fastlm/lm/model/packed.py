"""Texts of different lengths behind one another in one row (1, tokens), so that a batch has no padding."""

import torch
from torch import Tensor
from transformers import DynamicCache


class PackedTexts:
    """Compute on the texts of a packed row, each by itself.

    Args:
        bounds: int32 (B + 1,): text b has the tokens from bounds[b] up to bounds[b + 1].
        tokens: how many there are in all.

    Attributes:
        bounds_with_first: int32 (B + 1,), the bounds after `with_first`.
    """

    def __init__(self, bounds: Tensor, tokens: int):
        self.bounds = bounds
        texts = torch.arange(len(bounds) - 1, device=bounds.device)
        self._text = texts.repeat_interleave(bounds.diff(), output_size=tokens)  # (tokens,): the text of each token
        self._places = torch.arange(tokens, device=bounds.device) + self._text + 1  # of tokens and first rows in `with_first`
        self._first_places = bounds[:-1].long() + texts
        self.bounds_with_first = bounds + torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device)

    def mean(self, rows: Tensor) -> Tensor:
        """Return each text's mean (B, D) of rows (1, tokens, D)."""
        exact = rows[0].to(torch.promote_types(rows.dtype, torch.float32))
        return torch.segment_reduce(exact, "mean", offsets=self.bounds).to(rows.dtype)

    def total(self, values: Tensor) -> Tensor:
        """Return each text's sum (B,) of values (1, tokens)."""
        return torch.segment_reduce(values[0], "sum", offsets=self.bounds)

    def by_token(self, rows: Tensor) -> Tensor:
        """Return for each token its text's row: (1, tokens, D) of (B, D)."""
        return torch.nn.functional.embedding(self._text, rows)[None]

    def with_first(self, first: Tensor, rows: Tensor) -> Tensor:
        """Put one row before each text: (1, H, B + tokens, D), of first (B, H, 1, D) and rows (1, H, tokens, D)."""
        first = first.permute(2, 1, 0, 3)  # (1, H, B, D)
        dtype = torch.promote_types(first.dtype, rows.dtype)
        out = rows.new_empty(*rows.shape[:2], first.shape[2] + rows.shape[2], rows.shape[3], dtype=dtype)
        return out.index_copy_(2, self._places, rows.to(dtype)).index_copy_(2, self._first_places, first.to(dtype))


class PackedCache(DynamicCache):
    """A cache for one pass over packed texts: the first update of a layer gives one key and value for each text, and the
    second, with the keys and values of the tokens, returns all of them."""

    def __init__(self, texts: PackedTexts):
        super().__init__()
        self.texts, self.first = texts, {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take (B, H, 1, D) first; then take (1, H, tokens, D), and return (1, H, B + tokens, D)."""
        if layer_idx not in self.first:
            self.first[layer_idx] = key_states, value_states
            return key_states, value_states
        key, value = self.first[layer_idx]
        return self.texts.with_first(key, key_states), self.texts.with_first(value, value_states)
