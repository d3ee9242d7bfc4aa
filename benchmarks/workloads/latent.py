"""List what to time of the Gaussian latent."""

from functools import partial

import torch

from fastlm import reparameterize_with_kl
from fastlm.testing import FLOATS, seeded_normal
from workloads.peers import LATENT as PEERS  # noqa: F401  (what the sections name as their peers)
from workloads.workload import ON_GPU, Benchmark, Workload

_PARAMETERS = "mu", "logvar"
# Numbers that an element moves: mu, logvar -> z in the forward; then mu, logvar, grad_z -> grad_mu, grad_logvar.
FORWARD, BOTH = 3, 8
_HALF = 1 << 20, 1 << 22  # Half precision is worth a row for so many elements, and memory for the first.


def _workload(rows: int, columns: int, quick: bool = True, numbers: int = BOTH, half: bool | None = None) -> Workload:
    count = rows * columns
    half = count in _HALF if half is None else half
    dtypes = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    return Workload(
        f"{rows} x {columns}",
        lambda dtype: {n: seeded_normal(i, (rows, columns), dtype) for i, n in enumerate(_PARAMETERS)} | {"seed": 1},
        size=count,
        work=count,
        numbers=numbers * count,
        quick=dtypes if quick else (),
        memory=count == _HALF[0],
    )


_COMMON = {
    "function": reparameterize_with_kl,
    "unit": "Gelem/s",
    "axis": "elements",
    "peers": ("eager", "eager, compiled"),
    "sizes": "rows x columns",
    "own_noise": True,
}
_GPU_SHAPES = (32, 100), (1024, 256), (1024, 1024), (4096, 1024), (65536, 128), (65536, 1024), (16, 1 << 22)


def _gpu_section(name: str, numbers: int, differentiable: tuple[str, ...]) -> Benchmark:
    sized = partial(_workload, numbers=numbers, half=True)
    return Benchmark(
        name=f"{ON_GPU}reparameterize_with_kl, {name}",
        dtypes=(torch.float32, torch.bfloat16),
        backends=("cuda", "triton"),
        workloads=tuple(sized(*shape) for shape in _GPU_SHAPES),
        sized=sized,
        differentiable=differentiable,
        device="cuda",
        tiny="9x7",
        **_COMMON,
    )


BENCHMARKS = (
    Benchmark(
        name="reparameterize_with_kl",
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
        slow_in_half=("eager, compiled",),
        sized=_workload,
        differentiable=_PARAMETERS,
        **_COMMON,
    ),
    _gpu_section("forward", FORWARD, ()),
    _gpu_section("forward + backward", BOTH, _PARAMETERS),
)
