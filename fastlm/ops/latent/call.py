"""The record of one call: its tensors and options by name, in the order that schemas, the reference and kernels share."""

import math
from typing import NamedTuple

from torch import Tensor


class LatentCall(NamedTuple):
    """A checked call of the Gaussian latent.

    No float has a default: torch.compile would make an input of the graph of it.
    """

    mu: Tensor  # (*batch, *event)
    logvar: Tensor  # of mu's shape and dtype
    prior_mu: Tensor | None  # broadcastable to mu's shape
    prior_logvar: Tensor | None
    seed: Tensor | None  # int64, of the shape of leading dimensions of mu: a stream for each entry; None: no sample
    with_kl: bool
    event_dims: int
    free_bits: float
    low: float  # bounds of logvar
    high: float
    num_samples: int | None
    temperature: float

    def requires_grad(self) -> bool:
        """Tell whether one of the tensors that have gradients wants one."""
        return any(tensor is not None and tensor.requires_grad for tensor in self[:DIFFERENTIABLE])

    @classmethod
    def sample(cls, mu: Tensor, logvar: Tensor, seed: Tensor | None, temperature: float) -> "LatentCall":
        """Return the call for one sample and no KL."""
        return cls(mu, logvar, None, None, seed, False, 0, 0.0, -math.inf, math.inf, None, temperature)

    def with_seed(self, seed: Tensor) -> "LatentCall":
        """Return the call with that seed; ``_replace`` takes twice as long."""
        return LatentCall(*self[:DIFFERENTIABLE], seed, *self[TENSORS:])

    def output_shapes(self) -> tuple[tuple, tuple]:
        """Return the shapes of (z, kl); an output that is not wanted is empty."""
        shape = tuple(self.mu.shape)
        z = (0,) if self.seed is None else shape if self.num_samples is None else (self.num_samples, *shape)
        return z, shape[: len(shape) - self.event_dims] if self.with_kl else (0,)


INPUTS = (
    "Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor? seed, "
    "bool with_kl, int event_dims, float free_bits, float low, float high, SymInt? num_samples, float temperature"
)
TENSORS = 5  # The record's first fields are its tensors,
DIFFERENTIABLE = 4  # and the first of these have gradients.
