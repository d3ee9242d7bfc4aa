"""pythae's VAE, BetaVAE and MSSSIM_VAE on fastlm's kernels.

    import fastlm.integrations.pythae
    fastlm.replace(model)
    fastlm.restore(model)

A swapped model draws its latent and computes its KL in one pass, in training and evaluation, and so in ``reconstruct`` and
``embed``. The reconstruction loss, ``predict``, ``get_nll``, saving and loading are pythae's own. The noise is fastlm's stream
of a seed from torch's generator: ``torch.manual_seed`` repeats it, but it is not the noise of ``torch.randn``.

pythae's other models stay as they are. They draw several samples, transform them, or have another form of the latent's KL in
their loss.
"""

import torch
from torch import Tensor

from ..nn.replace import Swap, register
from ..ops.latent import reparameterize_with_kl
from ..ops.torch_op import are_plain
from .extras import require

require("pythae")

from pythae.models import MSSSIM_VAE, VAE, BetaVAE  # noqa: E402
from pythae.models.base.base_utils import ModelOutput  # noqa: E402


class _OneLatent:
    """A mixin before a VAE's class whose loss is the reconstruction's plus ``kl_weight`` times the KL, both batch means."""

    kl_weight = 1.0

    def forward(self, inputs: dict, **kwargs) -> ModelOutput:
        """Compute pythae's output of ``inputs["data"]`` (B, ...): the 0-d losses, recon_x (B, ...) and z (B, latent_dim)."""
        x = inputs["data"]
        posterior = self.encoder(x)
        z, kl = self._latent(posterior.embedding, posterior.log_covariance)
        recon_x = self.decoder(z)["reconstruction"]
        recon_loss, kl = self._reconstruction_loss(recon_x, x, z), kl.mean(dim=0)
        loss = recon_loss + self.kl_weight * kl
        return ModelOutput(recon_loss=recon_loss, reg_loss=kl, loss=loss, recon_x=recon_x, z=z)

    def _latent(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """Draw z (B, latent_dim) and return it with its KL (B,), in pythae's way if the kernel does not take the tensors."""
        if mu.shape != logvar.shape or torch.jit.is_tracing() or not are_plain((mu, logvar)):
            z, _ = self._sample_gauss(mu, torch.exp(0.5 * logvar))
            return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        return reparameterize_with_kl(mu.to(dtype), logvar.to(dtype))

    def _reconstruction_loss(self, recon_x: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Return pythae's 0-d reconstruction loss; the KL that its loss_function computes beside it is of a dummy latent."""
        unused = z.new_zeros(1, 1)
        return self.loss_function(recon_x, x, unused, unused, z)[1]


class FusedVAE(_OneLatent, VAE):
    """pythae's VAE with fastlm's latent."""


class FusedBetaVAE(_OneLatent, BetaVAE):
    """pythae's BetaVAE with fastlm's latent."""

    @property
    def kl_weight(self) -> float:
        return self.beta


class FusedMSSSIM_VAE(_OneLatent, MSSSIM_VAE):
    """pythae's MSSSIM_VAE with fastlm's latent."""

    @property
    def kl_weight(self) -> float:
        return self.beta


_FUSED = {VAE: FusedVAE, BetaVAE: FusedBetaVAE, MSSSIM_VAE: FusedMSSSIM_VAE}
_ORIGINAL = {fused: plain for plain, fused in _FUSED.items()}


class _LatentSwap(Swap):
    """The swap of the VAEs that `_FUSED` has a class for; other kinds of VAE are left, with a reason."""

    original = VAE
    subclasses = True
    methods = ("forward",)

    def why_not(self, module: VAE) -> str | None:
        if type(module) not in _FUSED:
            return f"{type(module).__name__} samples or weighs its latent in a way of its own"
        return None

    def is_swapped(self, module: torch.nn.Module) -> bool:
        return type(module) in _ORIGINAL

    def swap(self, module: VAE) -> str:
        return _become(module, _FUSED)

    def undo(self, module: VAE) -> str:
        return _become(module, _ORIGINAL)


def _become(module: VAE, classes: dict[type, type]) -> str:
    before = type(module)
    module.__class__ = classes[before]
    return f"{before.__name__} -> {type(module).__name__}"


register(_LatentSwap())
