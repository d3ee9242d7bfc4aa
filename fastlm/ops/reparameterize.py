"""The Gaussian latent of a VAE: sampling, and the KL divergence, in one pass over the inputs, forward and backward.

    z = mu + temperature * exp(logvar / 2) * eps,   eps ~ N(0, 1) from the stream of the seed
    kl = sum over the event of max(free_bits, (d^2 e^-prior_logvar + e^x - 1 - x) / 2)
    with d = mu - prior_mu and x = logvar - prior_logvar

`reparameterize`, `reparameterize_with_kl` and `gaussian_kl` are three views of one op (reparameterize_op.py). Its backward
draws the noise again: nothing but the inputs and the seed is saved.
Sources: Kingma & Welling, "Auto-Encoding Variational Bayes" (2013); free bits: Kingma et al., "Improved variational inference
with inverse autoregressive flow" (2016), appendix C.8.
"""

import math

import torch
from torch import Tensor

from .. import cuda_kernels
from ..backend import Implementation, cpu_why_not, select
from ..reference import reparameterize as reference
from .checks import check_integer, check_number, check_tensor
from .noise import check_seed, seed_tensor
from .reparameterize_op import latent
from .spec import FLOATS, Benchmark, Spec, Workload, seeded_normal
from .torch_op import EXPORTS, reference_only

# ---- checks -----------------------------------------------------------------------------------------------------------------


def _posterior(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Check mu and logvar, and return them; under autocast in one dtype, as torch promotes them there."""
    check_tensor("mu", mu)
    check_tensor("logvar", logvar)
    if logvar.dtype is not mu.dtype and torch.is_autocast_enabled(mu.device.type):
        wider = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar = mu.to(wider), logvar.to(wider)
    if logvar.shape != mu.shape:
        raise ValueError(f"logvar must have mu's shape {tuple(mu.shape)}; got {tuple(logvar.shape)}")
    if logvar.dtype != mu.dtype:
        raise TypeError(f"logvar must have mu's dtype {mu.dtype}; got {logvar.dtype}")
    if logvar.device != mu.device:
        raise ValueError(f"logvar must be on mu's device {mu.device}; got {logvar.device}")
    return mu, logvar


def _check_prior(name: str, prior: Tensor | None, mu: Tensor) -> None:
    if prior is None:
        return
    check_tensor(name, prior)
    if prior.device != mu.device:
        raise ValueError(f"{name} must be on mu's device {mu.device}; got {prior.device}")
    fits = prior.dim() <= mu.dim() and all(p in (1, m) for p, m in zip(reversed(prior.shape), reversed(mu.shape)))
    if not fits:
        raise ValueError(f"{name} must broadcast to mu's shape {tuple(mu.shape)}; got {tuple(prior.shape)}")


def _clamp(logvar_clamp: tuple[float, float] | None) -> tuple[float, float]:
    if logvar_clamp is None:
        return -math.inf, math.inf
    if not isinstance(logvar_clamp, (tuple, list)) or len(logvar_clamp) != 2:
        raise TypeError(f"logvar_clamp must be a pair (low, high); got {logvar_clamp!r}")
    low, high = logvar_clamp
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        raise TypeError(f"logvar_clamp must be a pair of numbers (low, high); got {logvar_clamp!r}")
    if not low <= high:  # also where one is NaN
        raise ValueError(f"logvar_clamp must be (low, high) with low <= high; got {logvar_clamp!r}")
    return float(low), float(high)


# ---- the public functions -------------------------------------------------------------------------------------------------


def reparameterize(
    mu: Tensor, logvar: Tensor, *, seed: int | Tensor | None = None, temperature: float = 1.0, backend: str | None = None
) -> Tensor:
    """Sample ``z = mu + temperature * exp(logvar / 2) * eps`` with eps ~ N(0, 1): the reparameterization trick.

    Args:
        mu: means, any shape, float32, bfloat16, float16 or float64, any strides.
        logvar: logarithms of the variances; shape, dtype and device of ``mu``.
        seed: an int, a 0-d int64 tensor, or an int64 tensor (B,), B = mu.shape[0], that gives each example a stream of its own,
            so that its noise does not depend on the batch around it. None draws a seed from torch's default generator.
        temperature: multiplies the standard deviation; 0 returns ``mu``.
        backend: 'cpu', 'cuda' or 'reference'; None picks the fastest that can do the call.

    Returns:
        z, contiguous, with ``mu``'s shape and dtype. The same seed gives the same noise on every backend.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        UnsupportedError: the named ``backend`` cannot do the call.
    """
    mu, logvar = _posterior(mu, logvar)
    options = (False, 0, 0.0, -math.inf, math.inf, None, check_number("temperature", temperature, 0.0))
    check_seed(seed, mu)
    return _run("reparameterize", (mu, logvar, None, None), options, backend, seed)[0]


def reparameterize_with_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    event_dims: int = 1,
    free_bits: float = 0.0,
    logvar_clamp: tuple[float, float] | None = None,
    num_samples: int | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a Gaussian latent and compute its KL divergence from the prior, in one pass: (z, kl).

    Args:
        mu, logvar, seed, backend: as in `reparameterize`.
        prior_mu, prior_logvar: the prior's mean and log-variance, of any floating dtype, broadcastable to ``mu``'s shape; each
            is 0 where it is None. They get gradients.
        event_dims: how many trailing dimensions make up one latent: kl is summed over them. 0 keeps every element.
        free_bits: nats that each latent dimension contributes at least; below it, it gets no gradient.
        logvar_clamp: (low, high) that ``logvar`` is held to, for z and kl alike; no gradient outside.
        num_samples: K draws per latent in one pass. None draws one, without a leading dimension.

    Returns:
        z: ``mu``'s shape, or (num_samples, *mu.shape), in ``mu``'s dtype, contiguous.
        kl: mu.shape without its last ``event_dims`` dimensions, in nats, never negative; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        UnsupportedError: the named ``backend`` cannot do the call.
    """
    if num_samples is not None:
        num_samples = check_integer("num_samples", num_samples, 1, 2**31 - 1)
    mu, logvar = _posterior(mu, logvar)
    options = _kl_options(mu, prior_mu, prior_logvar, event_dims, free_bits, logvar_clamp)
    check_seed(seed, mu)
    return _run("reparameterize_with_kl", (mu, logvar, prior_mu, prior_logvar), (*options, num_samples, 1.0), backend, seed)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    event_dims: int = 1,
    free_bits: float = 0.0,
    logvar_clamp: tuple[float, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) in nats, summed over the last ``event_dims`` dimensions.

    Arguments, result and errors are those of `reparameterize_with_kl`, without the sampling.
    """
    mu, logvar = _posterior(mu, logvar)
    options = _kl_options(mu, prior_mu, prior_logvar, event_dims, free_bits, logvar_clamp)
    return _run("gaussian_kl", (mu, logvar, prior_mu, prior_logvar), (*options, None, 1.0), backend, _NO_SAMPLE)[1]


def _kl_options(mu, prior_mu, prior_logvar, event_dims, free_bits, logvar_clamp) -> tuple:
    """Check what the two functions with a KL share, and return the first options of the op."""
    _check_prior("prior_mu", prior_mu, mu)
    _check_prior("prior_logvar", prior_logvar, mu)
    event_dims = check_integer("event_dims", event_dims, 0, mu.dim())
    return True, event_dims, check_number("free_bits", free_bits, 0.0), *_clamp(logvar_clamp)


# ---- the backends ---------------------------------------------------------------------------------------------------------


def _run_reference(tensors: tuple, options: tuple, eps: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    with_kl, event_dims, free_bits, low, high, num_samples, temperature = options
    return reference.reparameterize(
        *tensors,
        eps=eps,
        with_kl=with_kl,
        event_dims=event_dims,
        free_bits=free_bits,
        logvar_clamp=None if (low, high) == (-math.inf, math.inf) else (low, high),
        num_samples=num_samples,
        temperature=temperature,
    )


IMPLEMENTATIONS = (
    Implementation("cuda", latent, cuda_kernels.why_not),
    Implementation("cpu", latent, cpu_why_not),
    Implementation("reference", _run_reference, lambda tensor: None),
)


def _exported_noise(mu: Tensor, num_samples: int | None) -> Tensor:
    shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
    return torch.randn(shape, dtype=torch.float32, device=mu.device)


_NO_SAMPLE = object()  # in place of a seed: only the KL is wanted


def _run(op: str, tensors: tuple, options: tuple, backend: str | None, seed) -> tuple:
    """Choose the backend, then draw the seed, so that explain() leaves torch's generator alone; then run."""
    mu = tensors[0]
    only_reference = reference_only(*tensors)
    run = select(op, IMPLEMENTATIONS, (mu,), backend, only_reference)
    if seed is None and only_reference is EXPORTS:  # ONNX has a generator, but not ours
        return _run_reference((*tensors, None), options, _exported_noise(mu, num_samples=options[5]))
    return run((*tensors, None if seed is _NO_SAMPLE else seed_tensor(seed, mu)), options)


# ---- the specs ------------------------------------------------------------------------------------------------------------


def _latent(dtype, *shape, chunk_dim=None, transpose=False, **options) -> dict:
    """The arguments of a call: mu and logvar as asked for, the rest as given; a prior is given by its shape."""
    if chunk_dim is None:
        mu, logvar = seeded_normal(1, shape, dtype), seeded_normal(2, shape, dtype)
    else:
        doubled = [2 * n if d == chunk_dim else n for d, n in enumerate(shape)]
        mu, logvar = seeded_normal(3, doubled, dtype).chunk(2, dim=chunk_dim)
    if transpose:
        mu, logvar = mu.transpose(0, -1), logvar.transpose(0, -1)
    for i, name in enumerate(("prior_mu", "prior_logvar")):
        if name in options:
            options[name] = seeded_normal(4 + i, options[name], dtype)
    return {"mu": mu, "logvar": logvar, **options}


_KL_CASES = {
    "plain": lambda dtype: _latent(dtype, 5, 7),
    "chunk": lambda dtype: _latent(dtype, 6, 9, chunk_dim=1),
    "image chunk": lambda dtype: _latent(dtype, 2, 3, 5, 4, chunk_dim=1, event_dims=3),
    "transposed": lambda dtype: _latent(dtype, 9, 4, 6, transpose=True, event_dims=2),
    "every element": lambda dtype: _latent(dtype, 3, 37, event_dims=0),
    "one number": lambda dtype: _latent(dtype, event_dims=0),
    "one long row": lambda dtype: _latent(dtype, 20011),
    "many rows": lambda dtype: _latent(dtype, 701, 33),
    "empty": lambda dtype: _latent(dtype, 0, 5),
    "empty event": lambda dtype: _latent(dtype, 3, 0),
    "prior": lambda dtype: _latent(dtype, 4, 19, prior_mu=(4, 19), prior_logvar=(4, 19)),
    "prior per dimension": lambda dtype: _latent(dtype, 700, 19, prior_mu=(19,), prior_logvar=(1, 19)),
    "prior per example": lambda dtype: _latent(dtype, 8, 3, 5, prior_logvar=(8, 1, 1), event_dims=2),
    "prior per channel": lambda dtype: _latent(dtype, 2, 3, 4, 5, prior_mu=(3, 1, 1), event_dims=3),
    "free bits": lambda dtype: _latent(dtype, 9, 40, free_bits=0.3),
    "clamp": lambda dtype: _latent(dtype, 9, 40, logvar_clamp=(-0.5, 1.0)),
    "everything": lambda dtype: _latent(
        dtype, 4, 6, 11, chunk_dim=2, event_dims=2, prior_mu=(6, 11), prior_logvar=(11,), free_bits=0.1, logvar_clamp=(-1.5, 1)
    ),
}  # fmt: skip


def _with(make, **more):
    return lambda dtype: {**make(dtype), **more}


_SAMPLE_CASES = {
    "temperature": lambda dtype: _latent(dtype, 6, 50, seed=1, temperature=0.7),
    "no temperature": lambda dtype: _latent(dtype, 6, 50, seed=1, temperature=0.0),
    "seed per example": lambda dtype: _latent(dtype, 3, 50, seed=torch.tensor([-5, 2**62, 7])),
    "transposed": lambda dtype: _latent(dtype, 9, 4, 6, transpose=True, seed=2**64 - 1),
    "empty": lambda dtype: _latent(dtype, 0, 5, seed=torch.empty(0, dtype=torch.int64)),
}

_BOTH_CASES = {
    **{name: _with(make, seed=11) for name, make in _KL_CASES.items()},
    "samples": lambda dtype: _latent(dtype, 5, 7, num_samples=3, seed=4),
    "samples of examples": lambda dtype: _latent(dtype, 2, 9, chunk_dim=1, num_samples=5, seed=torch.tensor([4, 9])),
    "samples of everything": _with(_KL_CASES["everything"], num_samples=2, seed=torch.tensor([1, 2, 3, 4])),
}

_PRIOR_NAMES = ("prior_mu", "prior_logvar")

_BACKENDS = ("cuda", "cpu")
SPECS = (
    Spec("reparameterize_with_kl", reparameterize_with_kl, FLOATS, _BACKENDS, ("mu", "logvar", *_PRIOR_NAMES), _BOTH_CASES),
    Spec("reparameterize", reparameterize, FLOATS, _BACKENDS, ("mu", "logvar"), _SAMPLE_CASES),
    Spec("gaussian_kl", gaussian_kl, FLOATS, _BACKENDS, ("mu", "logvar", *_PRIOR_NAMES), _KL_CASES),
)


# ---- the benchmark ----------------------------------------------------------------------------------------------------------

_HALF = 1 << 20, 1 << 22  # elements for which half precision is worth a row, and memory for the first


def _workload(rows: int, columns: int, quick: bool = True) -> Workload:
    count = rows * columns
    dtypes = (torch.float32, torch.bfloat16) if count in _HALF else (torch.float32,)
    return Workload(
        f"{rows} x {columns}",
        lambda dtype: _latent(dtype, rows, columns, seed=1),
        size=count,
        work=count,
        numbers=8 * count,  # mu, logvar -> z; then mu, logvar, grad_z -> grad_mu, grad_logvar
        quick=dtypes if quick else (),
        memory=count == _HALF[0],
    )


BENCHMARKS = (
    Benchmark(
        name="reparameterize_with_kl",
        function=reparameterize_with_kl,
        unit="Gelem/s",
        axis="elements",
        dtypes=FLOATS,
        backends=("cpu",),
        workloads=(
            _workload(32, 100),
            _workload(256, 256),
            _workload(1024, 1024),
            _workload(4096, 1024),
            _workload(16384, 512),
            _workload(16384, 1024, quick=False),
        ),
        peers=("eager", "eager, compiled"),
        slow_in_half=("eager, compiled",),
        sizes="rows x columns",
        sized=_workload,
        differentiable=("mu", "logvar"),
        own_noise=True,
    ),
)
