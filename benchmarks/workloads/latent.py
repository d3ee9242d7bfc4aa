"""What to time of the Gaussian latent."""

import torch

from fastlm import reparameterize_with_kl
from fastlm.testing import FLOATS, seeded_normal
from workloads.workload import Benchmark, Workload

_PARAMETERS = "mu", "logvar"
_HALF = 1 << 20, 1 << 22  # elements for which half precision is worth a row, and memory for the first


def _workload(rows: int, columns: int, quick: bool = True) -> Workload:
    count = rows * columns
    dtypes = (torch.float32, torch.bfloat16) if count in _HALF else (torch.float32,)
    return Workload(
        f"{rows} x {columns}",
        lambda dtype: {n: seeded_normal(i, (rows, columns), dtype) for i, n in enumerate(_PARAMETERS)} | {"seed": 1},
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
        differentiable=_PARAMETERS,
        own_noise=True,
    ),
)
