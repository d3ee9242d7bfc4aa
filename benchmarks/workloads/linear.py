"""List what to time of linear: few rows by the speed at which weights are read, many by arithmetic."""

from functools import partial

import torch

from fastlm import linear
from fastlm.testing import seeded_normal
from workloads.peers import LINEAR as PEERS  # noqa: F401  (what the sections name as their peers)
from workloads.workload import Benchmark, Workload

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def _workload(rows: int, depth: int, out: int, *, few: bool, flops: int = 2, quick=(FP32, BF16)) -> Workload:
    """Return a product (rows, depth) x (depth, out). Few rows read the weights; many compute, ``flops`` a weight and row."""

    def make(dtype) -> dict:
        shapes = {"input": (rows, depth), "weight": (out, depth), "bias": (out,)}
        return {name: seeded_normal(i, shape, dtype) for i, (name, shape) in enumerate(shapes.items())}

    weights = depth * out
    return Workload(
        f"{rows} x {depth} -> {out}",
        make,
        size=rows,
        work=weights if few else flops * rows * weights,
        numbers=weights + rows * (depth + out),
        quick=quick,
    )


_few, _many = partial(_workload, few=True), partial(_workload, few=False)
_trained = partial(_many, flops=6)  # the forward, and the gradients of input and weight
_COMMON = {
    "function": linear,
    "axis": "rows",
    "dtypes": (FP32, BF16, FP16),
    "backends": ("cpu",),
    "peers": ("torch",),
    "sizes": "rows x depth x out",
    "by_rule": True,
}

BENCHMARKS = (
    Benchmark(
        name="linear, few rows",
        unit="GB/s",
        workloads=(  # More weights than most caches hold, as in a model.
            _few(1, 2048, 16384, quick=(FP32, BF16, FP16)),
            _few(4, 2048, 16384),
            _few(16, 2048, 16384),
        ),
        sized=_few,
        **_COMMON,
    ),
    Benchmark(
        name="linear, many rows",
        unit="GFLOP/s",
        workloads=(_many(64, 768, 3072, quick=(FP32, BF16, FP16)), _many(512, 768, 3072)),
        sized=_many,
        **_COMMON,
    ),
    Benchmark(
        name="linear, forward + backward",
        unit="GFLOP/s",
        workloads=(_trained(512, 768, 768),),
        sized=_trained,
        differentiable=("input", "weight", "bias"),
        **_COMMON,
    ),
)
