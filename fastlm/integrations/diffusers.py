"""The posterior of diffusers' autoencoders on fastlm's kernels.

    import fastlm.integrations.diffusers
    fastlm.replace(vae)  # any autoencoder with this posterior: AutoencoderKL, AutoencoderKLWan, AutoencoderKLCogVideoX, …
    fastlm.restore(vae)

A swapped autoencoder encodes to fastlm's `DiagonalGaussianDistribution`. All else in it, its saving and loading too, is
diffusers' own. Its attention calls ``F.scaled_dot_product_attention`` and needs no swap: run the model inside `fastlm.use`.
"""

import functools
import math
import sys
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ..nn.replace import Swap, register
from ..ops.checks import check_tensor
from ..ops.latent import gaussian_kl, reparameterize_with_kl
from ..ops.torch_op import are_plain
from .extras import require

require("diffusers")

from diffusers import ModelMixin  # noqa: E402
from diffusers.models.autoencoders import vae as theirs  # noqa: E402

LOGVAR_CLAMP = (-30.0, 20.0)  # diffusers'


# ---- the posterior ----------------------------------------------------------------------------------------------------------


class DiagonalGaussianDistribution(theirs.DiagonalGaussianDistribution):
    """diffusers' class of that name, whose sample and KL take one pass over the parameters, forward and backward.

    It differs from diffusers' in these points. The noise is fastlm's counter-based stream of one seed from the generator, not
    that of ``torch.randn``: the same generator gives the same sample again, but not diffusers' sample. `kl` and `nll` reduce
    all dimensions but the batch, where diffusers keeps the last one of a video, and are in float32 (float64 for float64).
    ``logvar``, ``std`` and ``var`` are computed on demand.

    Args:
        parameters: (B, 2 C, ...), the means and after them the log-variances, float32, bfloat16, float16 or float64, with any
            strides. Both halves are read in place, so do not change them in place afterwards.
        deterministic: no noise: ``std`` and ``var`` are 0, `sample` returns the mean, `kl` and `nll` return 0 of shape (1,).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        check_tensor("parameters", parameters)
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(f"parameters must have shape (B, 2 * channels, ...); got {tuple(parameters.shape)}")
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, self._logvar = parameters.chunk(2, dim=1)  # (B, C, ...), before the clamp
        self._sampled_kl: tuple[bool, Tensor] | None = None  # (whether gradients were on, the KL of a sample)

    @property
    def logvar(self) -> Tensor:
        """Return the log-variance (B, C, ...), clamped to [-30, 20]."""
        return self._logvar.clamp(*LOGVAR_CLAMP)

    @property
    def std(self) -> Tensor:
        """Return the standard deviation (B, C, ...)."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Return the variance (B, C, ...)."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generator | Sequence[Generator] | None = None) -> Tensor:
        """Draw a sample (B, C, ...) in the parameters' dtype.

        Args:
            generator: draws one int64 seed for the batch, on its own device; None uses torch's default generator. A sequence of
                B generators draws a seed for each example, whose noise then does not depend on the rest of the batch.
        """
        seed = _seed(generator, self.parameters)
        if self.deterministic:
            return self.mean.clone()
        z, kl = reparameterize_with_kl(
            self.mean, self._logvar, event_dims=self._event_dims, logvar_clamp=LOGVAR_CLAMP, seed=seed
        )
        self._sampled_kl = (torch.is_grad_enabled(), kl)
        return z

    def kl(self, other: theirs.DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return the KL (B,) from ``other`` or the standard normal, in nats; after `sample` the latter costs nothing."""
        if self.deterministic:
            return self._zero()
        if other is None:
            if self._sampled_kl is not None and self._sampled_kl[0] == torch.is_grad_enabled():
                return self._sampled_kl[1]
            return gaussian_kl(self.mean, self._logvar, event_dims=self._event_dims, logvar_clamp=LOGVAR_CLAMP)
        if other.deterministic:  # the KL from a point is infinite
            return self.mean.new_full((len(self.mean),), math.inf, dtype=self._accumulation_dtype)
        parameters = torch.broadcast_tensors(self.mean, self._logvar, other.mean, other.logvar)
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in parameters))
        mean, logvar, prior_mu, prior_logvar = (t.to(dtype) for t in parameters)
        prior = {"prior_mu": prior_mu, "prior_logvar": prior_logvar}
        return gaussian_kl(mean, logvar, **prior, event_dims=mean.dim() - 1, logvar_clamp=LOGVAR_CLAMP)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """Return -log of the density at ``sample`` (B, C, ...) in nats, summed over ``dims`` or all but the batch: (B,)."""
        if self.deterministic:
            return self._zero()
        dims = tuple(range(1, self.mean.dim())) if dims is None else tuple(dims)
        dtype = self._accumulation_dtype
        logvar = self.logvar.to(dtype)
        squares = (sample.to(dtype) - self.mean.to(dtype)) ** 2 * torch.exp(-logvar)
        return 0.5 * (math.log(2 * math.pi) + logvar + squares).sum(dims)

    @property
    def _event_dims(self) -> int:
        return self.mean.dim() - 1

    @property
    def _accumulation_dtype(self) -> torch.dtype:
        return torch.promote_types(self.mean.dtype, torch.float32)

    def _zero(self) -> Tensor:
        return self.mean.new_zeros(1, dtype=self._accumulation_dtype)


def _seed(generator: Generator | Sequence[Generator] | None, parameters: Tensor) -> Tensor | None:
    """Return the seed on the device of ``parameters``: 0-d, or (B,) for a generator per example. A list of one is that one."""
    if generator is None:
        return None
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    for one in generators:
        if not isinstance(one, Generator):
            raise TypeError(f"generator must be a torch.Generator, a list of them or None; got {type(one).__name__}")
    seeds = [torch.randint(2**63 - 1, (), generator=one, device=one.device).to(parameters.device) for one in generators]
    if len(seeds) == 1:
        return seeds[0]
    if len(seeds) != len(parameters):
        raise ValueError(f"generator must be one, or one for each of the {len(parameters)} examples; got {len(seeds)}")
    return torch.stack(seeds)


# ---- the swap ---------------------------------------------------------------------------------------------------------------


class _EncodesToOurs:
    """A mixin before an autoencoder's class, whose encode returns fastlm's posterior in place of diffusers'."""

    def encode(self, *args, **kwargs):
        output = super().encode(*args, **kwargs)
        if isinstance(output, tuple):
            return tuple(map(_ours, output))
        if hasattr(output, "latent_dist"):
            output.latent_dist = _ours(output.latent_dist)
        return output

    def __reduce_ex__(self, protocol):
        """Let copies and pickles make the class again from diffusers' one, as no module has it under its name."""
        (_, (_, *arguments), *state) = super().__reduce_ex__(protocol)
        return _new, (type(self)._swapped_from, *arguments), *state


def _ours(posterior: object) -> object:
    """Return fastlm's posterior for a posterior of diffusers, or else the object as it is.

    Subclasses of Tensor and torch.jit.trace keep diffusers' posterior.
    """
    if type(posterior) is not theirs.DiagonalGaussianDistribution:
        return posterior
    if torch.jit.is_tracing() or not are_plain((posterior.parameters,)):
        return posterior
    return DiagonalGaussianDistribution(posterior.parameters, posterior.deterministic)


@functools.cache
def _swapped(cls: type) -> type:
    """Return the subclass that encodes to fastlm's posterior; it has the same name, which diffusers saves in the config."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_EncodesToOurs, cls), {**names, "_swapped_from": cls})


def _new(cls: type, *arguments) -> object:
    return _swapped(cls).__new__(_swapped(cls), *arguments)


class _AutoencoderSwap(Swap):
    """The swap of any model of diffusers with an encode and code that builds a DiagonalGaussianDistribution."""

    original = ModelMixin
    subclasses = True
    methods = ("encode",)

    def why_not(self, module: ModelMixin) -> str | None:
        cls = type(module)
        names = {base.__module__ for base in cls.__mro__} - {theirs.__name__}
        homes = (vars(sys.modules.get(name, object)) for name in names)
        builds = any(home.get("DiagonalGaussianDistribution") is theirs.DiagonalGaussianDistribution for home in homes)
        if not builds or not hasattr(cls, "encode"):
            return f"{cls.__name__} does not encode to diffusers' DiagonalGaussianDistribution"
        return None

    def is_swapped(self, module: torch.nn.Module) -> bool:
        return isinstance(module, _EncodesToOurs)

    def swap(self, module: ModelMixin) -> str:
        module.__class__ = _swapped(type(module))
        return f"{type(module).__name__} encodes to fastlm's DiagonalGaussianDistribution"

    def undo(self, module: ModelMixin) -> str:
        module.__class__ = type(module)._swapped_from
        return f"{type(module).__name__} encodes to diffusers' DiagonalGaussianDistribution"


register(_AutoencoderSwap())
