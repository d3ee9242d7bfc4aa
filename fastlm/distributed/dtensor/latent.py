"""Run the Gaussian latent on DTensors that are sharded along the batch. The noise of an example is that of the whole call."""

import math

from torch import Tensor
from torch.distributed.tensor import DTensor

from ...ops.latent.call import DIFFERENTIABLE, TENSORS, LatentCall
from .plan import Axes, Plan, agreed_seed, mesh_of


def run_latent(run, call: LatentCall, seed, wants_sample: bool) -> tuple[DTensor | None, DTensor | None]:
    """Run a call of DTensors without its seed; ``run(call, seed)`` runs one of local tensors.

    mu (*batch, *event) stays sharded along the first dimension of the batch, and for the KL alone along any. Other dimensions
    are gathered first.
    """
    mu, batch = call.mu, call.mu.dim() - call.event_dims
    axes = tuple(f"batch {d}" if d < batch and (d == 0 or not wants_sample) else None for d in range(mu.dim()))
    plan = Plan.choose(mesh_of(call[:DIFFERENTIABLE]), [(mu, axes), (call.logvar, axes)])
    tensors = plan.local(mu, axes), plan.local(call.logvar, axes)
    tensors += tuple(plan.local(prior, _broadcast(prior, axes)) for prior in call[2:DIFFERENTIABLE])
    local = LatentCall(*tensors, None, *call[TENSORS:])
    if wants_sample:
        if seed is None:
            seed = agreed_seed(plan.mesh, tensors[0])
        if isinstance(seed, Tensor):
            seed = plan.local(seed, axes[: seed.dim()])
        if not isinstance(seed, Tensor) or seed.dim() == 0:
            local = _placed(local, plan, mu, axes)
    z, kl = run(local, seed)
    sizes = dict(zip(axes, mu.shape))
    of_z = axes if call.num_samples is None else (None, *axes)
    return (
        plan.whole(z, of_z, sizes) if wants_sample else None,
        plan.whole(kl, axes[:batch], sizes) if call.with_kl else None,
    )


def _broadcast(prior: Tensor | None, axes: Axes) -> Axes:
    """Return the axes of a prior, which broadcasts to mu."""
    if prior is None or prior.dim() == 0:
        return ()
    return tuple(None if size == 1 else axis for size, axis in zip(prior.shape, axes[-prior.dim() :]))


def _placed(local: LatentCall, plan: Plan, mu: Tensor, axes: Axes) -> LatentCall:
    """Give the local call its place in the stream of a single seed."""
    if not axes or axes[0] is None or axes[0] not in plan.axes:
        return local
    row = math.prod(mu.shape[1:])
    return local._replace(first=plan.mine(axes[0], mu.shape[0]).start * row, sample_stride=mu.shape[0] * row)
