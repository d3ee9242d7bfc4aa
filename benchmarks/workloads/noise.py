"""List what to time of the noise."""

import torch

from fastlm.ops.noise import normal
from workloads.peers import NOISE as PEERS  # noqa: F401  (what the sections name as their peers)
from workloads.workload import Benchmark, Workload


def _workload(count: int, quick: tuple = (torch.float32,)) -> Workload:
    def make(dtype):
        return {"shape": (count,), "seed": 1}

    return Workload(f"{count:,}", make, size=count, work=count, numbers=count, quick=quick, memory=count >= 1 << 20)


BENCHMARKS = (
    Benchmark(
        name="normal",
        function=normal,
        unit="Gelem/s",
        axis="elements",
        dtypes=(torch.float32,),
        backends=("cpu",),
        workloads=(_workload(1 << 16), _workload(1 << 20), _workload(1 << 24, quick=())),
        peers=("torch.randn",),
        sizes="elements",
        sized=_workload,
        own_noise=True,
    ),
)
