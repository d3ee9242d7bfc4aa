"""Name the tensors of one call, in the order that the schema, the reference and kernels share."""

from typing import NamedTuple

from torch import Tensor


class LinearCall(NamedTuple):
    """Hold a call of linear, which torch has not checked yet."""

    input: Tensor  # (..., K)
    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)
    backend: str | None  # the one that the caller named, for the products of the gradients

    def requires_grad(self) -> bool:
        """Tell whether one of the tensors requires a gradient."""
        return self.input.requires_grad or self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


TENSORS = 3  # The first 3 fields are the tensors.
INPUTS = "Tensor input, Tensor weight, Tensor? bias"
