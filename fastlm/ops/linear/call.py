"""Name the tensors of one call, in the order that the schema, the reference and kernels share."""

from typing import NamedTuple

from torch import Tensor


def requires_grad(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether one of the tensors requires a gradient."""
    return input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


class LinearCall(NamedTuple):
    """Hold a call of linear, which torch has not checked yet."""

    input: Tensor  # (..., K)
    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)
    backend: str | None  # the one that the caller named, for the products of the gradients


TENSORS = 3  # The first 3 fields are the tensors.
INPUTS = "Tensor input, Tensor weight, Tensor? bias"
