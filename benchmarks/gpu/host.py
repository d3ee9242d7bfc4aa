"""Measure what the launches of attention and the latent cost the host before a GPU starts. It needs no GPU.

Triton's own binder and launcher run, on a driver that does nothing (idle_driver.py). Not in a figure: the driver's own launch
and encoding of descriptors, microseconds more, and what the op does before its plan. Figures are medians of the thread's
own time, because the machine may have other work.
"""

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from fastlm.kernels import attention, latent
from fastlm.kernels.common.plans import forget_plans
from rich.table import Table
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gpu import idle_driver

GPUS = ("sm_80", "sm_90")  # Without and with descriptors.
REPEAT, SAMPLES = 100, 9


class HostTime(NamedTuple):
    """The host's microseconds of a call, or of one of its launches."""

    arch: str
    name: str
    first: float | None  # A plan of its own: choosing kernels, grids and arguments; None for one launch.
    plan: float | None  # Putting the tensors of a call that is like one before into its plan.
    descriptors: float  # Of that, making the descriptors of TMA.
    binder: float  # What Triton takes to look a kernel up by its arguments.
    launcher: float  # What Triton takes to hand the kernel and its arguments to the driver.
    call: float | None  # A repeated call: its plan, and its launches as `run` starts them.


def microseconds(function: Callable) -> float:
    """Return the median of the thread's microseconds of a call."""
    samples = []
    for _ in range(SAMPLES):
        start = time.thread_time()
        for _ in range(REPEAT):
            function()
        samples.append((time.thread_time() - start) / REPEAT * 1e6)
    return statistics.median(samples)


def _tensor(*shape: int, dtype=torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def calls(arch: str) -> dict[str, Callable[[], list[attention.Launch]]]:
    """Return the planners of causal attention, its backward, a step of decoding, and the latent of 32 x 100."""
    query, lse = _tensor(1, 32, 256, 128), _tensor(1, 32, 256, dtype=torch.float32)
    statistics = _tensor(1, 32, 256, 2, dtype=torch.float32)
    call = attention.Call(query, query, query, right=0, scale=0.1, arch=arch)
    grads = query, query, query, None
    one, new, cache, one_lse = _tensor(1, 32, 1, 128), _tensor(1, 8, 1, 128), _tensor(1, 8, 4096, 128), lse[:, :, :1]
    lengths = _tensor(1, dtype=torch.int32)
    mu, kl = _tensor(32, 100, dtype=torch.float32), _tensor(32, dtype=torch.float32)
    latents, latent_grads = (mu, mu, None, None), (mu, mu, None, None)
    options = latent.Options(_tensor(dtype=torch.int64), 1, (0, 0, 0), (0.0, -math.inf, math.inf, 1.0), lanes=32)
    step = attention.KVCacheCall(one, cache, cache, lengths, new, new, right=0, scale=0.1, arch=arch)
    return {
        "forward": lambda: attention.plan_forward(call, query, lse, statistics),
        "backward": lambda: attention.plan_backward(call, query, statistics, query, None, grads, lse),
        "decoding": lambda: attention.plan_kvcache(step, one, one_lse),
        "latent": lambda: latent.plan_forward(latents, mu, kl, options),
        "latent backward": lambda: latent.plan_backward(latents, mu, kl, latent_grads, options),
    }


def _time_launch(arch: str, launch: attention.Launch) -> HostTime:
    """Return a launch's times."""
    start = launch.kernel[(launch.grid,)]
    binary = start(**launch.arguments, **launch.options)
    arguments = list(launch.arguments.values())
    launcher = microseconds(lambda: binary[(launch.grid, 1, 1)](*arguments))
    binder = microseconds(lambda: start(**launch.arguments, **launch.options)) - launcher
    made = [value for value in arguments if isinstance(value, TensorDescriptor)]
    descriptors = microseconds(lambda: [TensorDescriptor(d.base, d.shape, d.strides, d.block_shape) for d in made])
    name = launch.kernel.__name__.removeprefix("attention_").removeprefix("latent_")
    return HostTime(arch, name, None, None, descriptors if made else 0.0, binder, launcher, None)


def _time_call(arch: str, name: str, plan: Callable) -> list[HostTime]:
    """Return the times of a call, and behind it those of its launches."""
    launches = [_time_launch(arch, launch) for launch in plan()]
    sums = (sum(getattr(launch, part) for launch in launches) for part in ("descriptors", "binder", "launcher"))

    def first_plan() -> None:
        forget_plans()
        plan()

    plans = microseconds(first_plan), microseconds(plan)
    return [HostTime(arch, name, *plans, *sums, microseconds(lambda: attention.run(plan()))), *launches]


def time_calls(arch: str) -> list[HostTime]:
    """Return the times of all calls on a GPU."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        idle_driver.activate(arch, Path(folder))
        return [row for name, plan in calls(arch).items() for row in _time_call(arch, name, plan)]


def table(archs: list[str]) -> Table:
    """Return the table of times, each GPU's from a process of its own."""
    made = Table("GPU", title="µs of the host without the driver's own; medians of thread time")
    made.add_column("call", no_wrap=True)
    for column in HostTime._fields[2:]:
        made.add_column(column, justify="right")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for row in (row for arch in archs for row in pool.apply(time_calls, (arch,))):
            name = row.name if row.plan else f"  {row.name}"
            made.add_row(row.arch, name, *("" if each is None else f"{each:.1f}" for each in row[2:]))
    return made
