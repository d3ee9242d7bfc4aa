"""Put bands around tensors, so that a read or a write outside them shows."""

import math

import torch

SENTINEL = 12.5


class Guarded:
    """Hold tensors inside larger ones full of a sentinel: NaN around inputs, a number around outputs."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.bands: list[tuple[torch.Tensor, torch.Tensor]] = []

    def put(self, tensor: torch.Tensor, band: float = math.nan) -> torch.Tensor:
        """Copy a tensor (batch, heads, rows, dim) into a band around every dimension. Aligned rows stay aligned."""
        batch, heads, rows, dim = tensor.shape
        around = torch.full((batch + 2, heads + 2, rows + 3, dim + 16), band, dtype=tensor.dtype, device=self.device)
        inside = torch.zeros_like(around, dtype=torch.bool)
        window = (slice(1, -1), slice(1, -1), slice(1, rows + 1), slice(8, dim + 8))
        around[window], inside[window] = tensor, True
        self.bands.append((around, inside))
        return around[window]

    def check(self, band: float) -> None:
        for around, inside in self.bands:
            outside = around[~inside]
            assert (outside.isnan() if math.isnan(band) else outside == band).all()
