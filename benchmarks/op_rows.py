"""What there is to time: each benchmark x size x dtype x implementation, read from what the ops say of themselves."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from fastlm.ops.spec import Benchmark, Workload, all_benchmarks, seeded_normal

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torch.compile starts no workers, to be busy beside what is timed
COMPILE = "compile"  # torch.compile of the first peer
FASTLM = "fastlm "  # followed by the backend's name

Setting = tuple[str, str, str]  # benchmark, workload, dtype: what implementations are compared within


class Unavailable(Exception):
    """An implementation that cannot run here, and why."""


@cache
def _benchmarks() -> dict[str, Benchmark]:
    return {benchmark.name: benchmark for benchmark in all_benchmarks()}


def find(op: str, workload: str) -> tuple[Benchmark, Workload]:
    benchmark = _benchmarks()[op]
    return benchmark, next(w for w in benchmark.workloads if w.name == workload)


def settings(full: bool) -> Iterator[Setting]:
    """Every size in the dtypes that it is timed in by default; with ``full``, in every dtype."""
    for benchmark in _benchmarks().values():
        for workload in benchmark.workloads:
            for dtype in benchmark.dtypes if full else workload.quick:
                yield benchmark.name, workload.name, str(dtype).removeprefix("torch.")


def implementations(op: str) -> list[str]:
    """fastlm's backends, what a user would write or pick instead, and where asked for the first of those compiled."""
    benchmark = _benchmarks()[op]
    own = [FASTLM + backend for backend in benchmark.backends]
    return own + list(benchmark.peers) + [COMPILE] * benchmark.compiled


def timed(op: str, dtype: str, full: bool) -> list[str]:
    """Those of the implementations that a run times in a dtype."""
    left_out = () if full or dtype == "float32" else _benchmarks()[op].slow_in_half
    return [name for name in implementations(op) if name not in left_out]


def all_rows(full: bool) -> Iterator[tuple[str, str, str, str]]:
    """(op, workload, dtype, implementation): the implementations of a setting one after the other."""
    for setting in settings(full):
        for implementation in timed(setting[0], setting[2], full):
            yield *setting, implementation


@dataclass(frozen=True)
class Cost:
    """What a call of a workload takes, whoever makes it."""

    unit: str  # of throughput
    size: int  # on the axis of the plot
    work: int  # what throughput counts
    bytes_moved: int  # what must cross the memory bus


def cost(op: str, workload: str, dtype: str) -> Cost:
    benchmark, work = find(op, workload)
    itemsize = getattr(torch, dtype).itemsize
    counted = work.work * (itemsize if benchmark.unit == "GB/s" else 1)
    return Cost(benchmark.unit, work.size, counted, work.numbers * itemsize)


def baseline(op: str) -> str:
    """The implementation that speed-ups are counted from: the first peer."""
    return next(iter(_benchmarks()[op].peers))


def axis_of(op: str) -> str:
    return _benchmarks()[op].axis


def arguments_of(op: str, workload: str, dtype: str) -> dict:
    return find(op, workload)[1].make(getattr(torch, dtype))


def function_of(benchmark: Benchmark, implementation: str) -> Callable:
    if implementation.startswith(FASTLM):
        return partial(benchmark.function, backend=implementation.removeprefix(FASTLM))
    if implementation == COMPILE:
        torch.compiler.reset()  # each size gets code for its own shape, as in a program that has one
        return torch.compile(next(iter(benchmark.peers.values())), dynamic=False)
    return benchmark.peers[implementation]


def outputs_of(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def leaves_of(benchmark: Benchmark, arguments: dict) -> dict[str, Tensor]:
    """The tensors of a call that get gradients, by name."""
    return {
        name: arguments[name].requires_grad_() for name in benchmark.differentiable if isinstance(arguments.get(name), Tensor)
    }


def output_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [seeded_normal(100 + i, out.shape, out.dtype) for i, out in enumerate(outputs)]


def step_of(benchmark: Benchmark, implementation: str, arguments: dict) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: forward and backward, or the forward alone where nothing gets a gradient. It has run once.

    The step returns the outputs, then the gradients.
    Raises Unavailable where a peer fails to import, to compile or to run, or fastlm does not have the backend here.
    """
    try:
        function = function_of(benchmark, implementation)
        leaves = tuple(leaves_of(benchmark, arguments).values())
        gradients = output_gradients(outputs_of(function(**arguments))) if leaves else []

        def forward():
            return outputs_of(function(**arguments))

        def forward_backward():
            outputs = forward()
            return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

        step = forward_backward if leaves else forward
        step()
    except Exception as error:
        if implementation.startswith(FASTLM) and not isinstance(error, NotImplementedError):
            raise  # a bug of ours, not something missing
        raise Unavailable(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:240]) from error
    return step


def fresh_step(op: str, workload: str, dtype: str, implementation: str) -> Callable:
    """`step_of` with arguments of its own: what memory.py measures in a process of its own."""
    return step_of(find(op, workload)[0], implementation, arguments_of(op, workload, dtype))
