"""torch.distributions' Normal on fastlm's kernels: ``from fastlm.integrations.distributions import Normal``.

A kernel draws the noise, which is never stored: the backward draws it again. The KL divergence, from and to torch's Normal too,
has no cancellation. Neither uses the scale's logarithm, whose rounding would show in the sample. So the sample is right to its
last bits for the smallest scale. A scale of 0 or below, if validation lets it pass, means what it means in torch.
"""

import functools

import torch
from torch import Tensor, distributions
from torch.distributions.kl import _kl_normal_normal, register_kl

from ..ops.checks import check_tensor
from ..ops.latent import gaussian_kl, standard_normal
from ..ops.noise import check_seed, seed_tensor
from ..ops.torch_op import are_plain


class Normal(distributions.Normal):
    """torch.distributions.Normal with fastlm's sampling and KL; all else is torch's.

    It differs from torch's in these points. The noise is fastlm's stream of a seed: ``torch.manual_seed`` repeats a sample, but
    the sample is not torch's. Sampling needs a ``loc`` of float32, bfloat16, float16 or float64. The KL is in float32 at least.
    Neither has forward-mode derivatives.
    """

    def rsample(self, sample_shape: tuple[int, ...] = torch.Size(), *, seed: int | Tensor | None = None) -> Tensor:
        """Draw ``loc + scale * eps`` of shape (*sample_shape, *batch_shape), with gradients for both.

        Args:
            seed: as in `fastlm.reparameterize`; an int64 tensor (batch_shape[0],) gives each example its own stream.

        Raises:
            TypeError, ValueError: ``loc`` has another dtype, or ``seed`` does not fit.
        """
        if seed is None and _is_torch_s(self):
            return super().rsample(sample_shape)
        check_tensor("loc", self.loc)
        check_seed(seed, self.loc)
        shape = self._extended_shape(sample_shape)
        return _Sample.apply(self.loc, self.scale, seed_tensor(seed, self.loc), shape)

    def sample(self, sample_shape: tuple[int, ...] = torch.Size(), *, seed: int | Tensor | None = None) -> Tensor:
        """Draw as `rsample` does, without gradients and in loc's dtype."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed=seed).to(self.loc.dtype)


def _is_torch_s(*normals: distributions.Normal) -> bool:
    """Return whether torch's own code must run: on subclasses of Tensor such as DTensor, and under torch.jit.trace."""
    return torch.jit.is_tracing() or not are_plain(t for normal in normals for t in (normal.loc, normal.scale))


# ---- the sample -------------------------------------------------------------------------------------------------------------


def _noise(shape: tuple[int, ...], batch_shape: tuple[int, ...], dtype: torch.dtype, seed: Tensor) -> Tensor:
    """Draw standard normals of ``shape`` = (*samples, *batch_shape); a seed per example gives all samples of the example."""
    if seed.dim() == 0:
        return standard_normal(shape, dtype, seed)
    samples = shape[: len(shape) - len(batch_shape)]
    by_example = standard_normal((batch_shape[0], *samples, *batch_shape[1:]), dtype, seed)
    return by_example.movedim(0, len(samples))


class _Sample(torch.autograd.Function):
    """Compute loc + scale * eps, and save only the seed for the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loc: Tensor, scale: Tensor, seed: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.addcmul(loc, scale, _noise(shape, loc.shape, loc.dtype, seed))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        loc, _, seed, shape = inputs
        ctx.save_for_backward(seed)
        ctx.of_noise = shape, loc.shape, loc.dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, batch_shape, _ = ctx.of_noise
        grad_loc = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_loc = grad.sum_to_size(batch_shape)
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * _noise(*ctx.of_noise, *ctx.saved_tensors)).sum_to_size(batch_shape)
        return grad_loc, grad_scale, None, None


# ---- the KL divergence ------------------------------------------------------------------------------------------------------


class _KL(torch.autograd.Function):
    """Compute KL(N(p_loc, p_scale^2) || N(q_loc, q_scale^2)), element by element, in float32 or float64.

    With d = (p_loc - q_loc) / q_scale and r = p_scale / q_scale it is (d^2 + r^2 - 1 - log r^2) / 2, the KL of N(d, r^2) from
    the standard normal. log r is computed by log1p of the scales' difference relative to the smaller scale; the difference is
    exact near r = 1. The gradients compute r^2 - 1 as the product of the scales' difference and sum.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(p_loc: Tensor, p_scale: Tensor, q_loc: Tensor, q_scale: Tensor) -> Tensor:
        p_scale, q_scale = p_scale.abs(), q_scale.abs()
        gap = p_scale - q_scale
        log_ratio = torch.log1p(gap.abs() / torch.minimum(p_scale, q_scale)).copysign(gap)
        return gaussian_kl((p_loc - q_loc) / q_scale, 2 * log_ratio, event_dims=0)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        p_loc, p_scale, q_loc, q_scale = ctx.saved_tensors
        d = (p_loc - q_loc) / q_scale
        r2_minus_1 = (p_scale - q_scale) / q_scale * ((p_scale + q_scale) / q_scale)
        grad_loc = grad * d / q_scale
        return grad_loc, grad * r2_minus_1 / p_scale, -grad_loc, -grad * (d * d + r2_minus_1) / q_scale


@register_kl(Normal, Normal)
@register_kl(Normal, distributions.Normal)
@register_kl(distributions.Normal, Normal)
def _kl(p: distributions.Normal, q: distributions.Normal) -> Tensor:
    """Return the KL of the broadcast batch shape, in float32, or in float64 if a parameter is."""
    if _is_torch_s(p, q):
        return _kl_normal_normal(p, q)
    parameters = torch.broadcast_tensors(p.loc, p.scale, q.loc, q.scale)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in parameters), torch.float32)
    return _KL.apply(*(t.to(dtype) for t in parameters))
