"""Put flat tensors between bands of numbers, so that a read or a write outside them shows."""

import math

import numpy as np
import torch

BAND = 64  # Elements.


class Banded:
    """Put tensors between two bands, at an address that is a multiple of 16 bytes, or only of their element's size."""

    def __init__(self, shift: int, device: str):
        self.shift, self.device, self.whole, self.inputs = shift, device, [], []

    def empty(self, like, shape, dtype=None):
        """Make an output, as a backend's function of that name does."""
        count = math.prod(shape)
        whole = torch.full((count + 2 * BAND + self.shift,), 12.5, dtype=dtype or like.dtype, device=like.device)
        self.whole.append((whole, count))
        return whole[BAND + self.shift :][:count].fill_(math.nan).view(tuple(shape))

    def put(self, tensor):
        """Copy a tensor, with NaN around it."""
        around = torch.full((tensor.numel() + 2 * BAND + self.shift,), math.nan, dtype=tensor.dtype)
        around[BAND + self.shift :][: tensor.numel()] = tensor.flatten()
        self.inputs.append((around.to(self.device), tensor.numel()))
        return self.inputs[-1][0][BAND + self.shift :][: tensor.numel()].view(tensor.shape)

    def hold(self, addresses: np.ndarray) -> bool:
        """Tell whether one of these addresses lies in a band."""
        bands = []
        for whole, count in (*self.whole, *self.inputs):
            begin, inside = whole.data_ptr(), whole.data_ptr() + (BAND + self.shift) * whole.element_size()
            bands += [(begin, inside), (inside + count * whole.element_size(), begin + whole.nbytes)]
        return any(((addresses >= begin) & (addresses < end)).any() for begin, end in bands)

    def check(self):
        """Assert that the outputs, and nothing else, were written."""
        for whole, count in self.whole:
            begin, end = BAND + self.shift, BAND + self.shift + count
            assert (whole[:begin] == 12.5).all() and (whole[end:] == 12.5).all(), "a write outside"
            assert not whole[begin:end].isnan().any(), "an element was not written, or a read outside"
