"""The latent of a VAE as a module."""

import torch
from torch import Tensor

from ..ops.latent import reparameterize_with_kl
from .linear import Linear


class GaussianLatent(torch.nn.Module):
    """The layers between the encoder and the decoder of a VAE: Linear -> (mu, logvar) -> (z, kl).

    One linear layer computes mu and logvar; the kernel reads both in place, without a copy.

    Args:
        in_features: the size of the last dimension of the input.
        latent_dim: the size D of the latent.
        free_bits, logvar_clamp: as in `fastlm.reparameterize_with_kl`.
        bias, device, dtype: as in `torch.nn.Linear`.

    Shapes: x (*, in_features) -> z (*, D) in x's dtype and kl (*) in float32, in nats (float64 for a float64 module).
    """

    def __init__(
        self,
        in_features: int,
        latent_dim: int,
        *,
        free_bits: float = 0.0,
        logvar_clamp: tuple[float, float] | None = None,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.latent_dim = in_features, latent_dim
        self.free_bits, self.logvar_clamp = free_bits, logvar_clamp
        self.linear = Linear(in_features, 2 * latent_dim, bias=bias, device=device, dtype=dtype)

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar) of the posterior of ``x``, each (*, D), as two views of one tensor."""
        mu, logvar = self.linear(x).chunk(2, dim=-1)
        return mu, logvar

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw z (*, D), or (num_samples, *, D), from the posterior of ``x``; return z and the KL (*) from N(0, 1)."""
        return self.sample(*self.parameters_of(x), seed=seed, num_samples=num_samples)

    def sample(
        self, mu: Tensor, logvar: Tensor, *, seed: int | Tensor | None = None, num_samples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw z and compute its kl, as `forward` does, from mu and logvar (*, D), as `parameters_of` returns them."""
        return reparameterize_with_kl(
            mu, logvar, free_bits=self.free_bits, logvar_clamp=self.logvar_clamp, num_samples=num_samples, seed=seed
        )

    def mode(self, x: Tensor) -> Tensor:
        """Return the posterior's mean mu (*, D), for evaluation."""
        return self.parameters_of(x)[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, latent_dim={self.latent_dim}"
