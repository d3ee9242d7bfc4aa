"""Name the tensors and options of one call, in the order that schemas, the reference and kernels share."""

import math
from typing import NamedTuple

from torch import Tensor


class LatentCall(NamedTuple):
    """Hold a checked call of the Gaussian latent.

    No float has a default, because torch.compile would make it an input of the graph.
    """

    mu: Tensor  # (*batch, *event)
    logvar: Tensor  # mu's shape and dtype
    prior_mu: Tensor | None  # broadcastable to mu's shape
    prior_logvar: Tensor | None
    seed: Tensor | None  # int64, shaped like leading dimensions of mu, one stream per entry; None: no sample
    with_kl: bool
    event_dims: int
    free_bits: float
    low: float  # bounds of logvar
    high: float
    num_samples: int | None
    temperature: float
    first: int  # Sample k begins at element first + k * sample_stride of each stream, as a part of a larger call does.
    sample_stride: int | None  # None: the elements that the call itself has of a stream

    def requires_grad(self) -> bool:
        """Tell whether one of the differentiable tensors requires a gradient."""
        return any(tensor is not None and tensor.requires_grad for tensor in self[:DIFFERENTIABLE])

    @classmethod
    def sample(cls, mu: Tensor, logvar: Tensor, seed: Tensor | None, temperature: float) -> "LatentCall":
        """Return a call for one sample and no KL."""
        return cls(mu, logvar, None, None, seed, False, 0, 0.0, -math.inf, math.inf, None, temperature, 0, None)

    def with_seed(self, seed: Tensor) -> "LatentCall":
        """Return the call with that seed, in half the time of ``_replace``."""
        return LatentCall(*self[:DIFFERENTIABLE], seed, *self[TENSORS:])

    def output_shapes(self) -> tuple[tuple, tuple]:
        """Return the shapes of (z, kl); an unwanted output is empty."""
        shape = tuple(self.mu.shape)
        z = (0,) if self.seed is None else shape if self.num_samples is None else (self.num_samples, *shape)
        return z, shape[: len(shape) - self.event_dims] if self.with_kl else (0,)


INPUTS = (
    "Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor? seed, "
    "bool with_kl, int event_dims, float free_bits, float low, float high, SymInt? num_samples, float temperature, "
    "SymInt first, SymInt? sample_stride"
)
TENSORS = 5  # The first 5 fields are the tensors.
DIFFERENTIABLE = 4  # The first 4 of them have gradients.
