"""The specs of the Gaussian latent: calls that between them cover the features."""

import torch

from cases.spec import Spec
from fastlm import gaussian_kl, reparameterize, reparameterize_with_kl
from fastlm.testing import FLOATS, seeded_normal


def _latent(dtype, *shape, chunk_dim=None, transpose=False, **options) -> dict:
    """Make the arguments of a call: mu and logvar as asked for, the rest as given. A prior is given by its shape."""
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

_BACKENDS = ("cuda", "triton", "cpu")
SPECS = (
    Spec("reparameterize_with_kl", reparameterize_with_kl, FLOATS, _BACKENDS, ("mu", "logvar", *_PRIOR_NAMES), _BOTH_CASES),
    Spec("reparameterize", reparameterize, FLOATS, _BACKENDS, ("mu", "logvar"), _SAMPLE_CASES),
    Spec("gaussian_kl", gaussian_kl, FLOATS, _BACKENDS, ("mu", "logvar", *_PRIOR_NAMES), _KL_CASES),
)
