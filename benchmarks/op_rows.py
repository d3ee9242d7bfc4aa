"""What there is to time: each op x size x dtype x implementation, read from the ops' specs alone."""

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastlm.ops.spec import Spec, Workload, all_specs, seeded_normal

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # torch.compile starts no workers, to be busy beside what is timed
LARGE = 1 << 20  # elements from which memory and half precision are worth a row
COMPILE = "compile"  # torch.compile of the first peer
FASTLM = "fastlm "  # followed by the backend's name

Setting = tuple[str, str, str]  # op, workload, dtype: what implementations are compared within


class Unavailable(Exception):
    """An implementation that cannot run here, and why."""


def find(op: str, workload: str) -> tuple[Spec, Workload]:
    spec = next(spec for spec in all_specs() if spec.name == op)
    return spec, next(w for w in spec.workloads if w.name == workload)


def settings(full: bool) -> Iterator[Setting]:
    """Every size in float32, the large ones in bfloat16 too; with ``full`` also the long sizes, and every dtype."""
    for spec in all_specs():
        for workload in spec.workloads:
            if workload.quick or full:
                for dtype in spec.dtypes:
                    if full or dtype == torch.float32 or (dtype == torch.bfloat16 and workload.elements >= LARGE):
                        yield spec.name, workload.name, str(dtype).removeprefix("torch.")


def implementations(op: str) -> list[str]:
    """fastlm's backends, what a user would write or pick instead, and for ops with gradients the first of those compiled."""
    spec = next(spec for spec in all_specs() if spec.name == op)
    compiled = [COMPILE] if spec.differentiable and spec.peers else []
    return [FASTLM + backend for backend in spec.backends] + list(spec.peers) + compiled


def all_rows(full: bool) -> Iterator[tuple[str, str, str, str]]:
    """(op, workload, dtype, implementation): the implementations of a setting one after the other."""
    for setting in settings(full):
        for implementation in implementations(setting[0]):
            yield *setting, implementation


def cost(op: str, workload: str, dtype: str) -> tuple[int, int]:
    """The elements that throughput counts, and the bytes that must cross the memory bus."""
    work = find(op, workload)[1]
    return work.elements, work.elements * work.numbers_moved * getattr(torch, dtype).itemsize


def baseline(op: str) -> str | None:
    """The implementation that speed-ups are counted from: the first peer."""
    spec = next(spec for spec in all_specs() if spec.name == op)
    return next(iter(spec.peers), None)


def arguments_of(op: str, workload: str, dtype: str) -> dict:
    return find(op, workload)[1].make(getattr(torch, dtype))


def function_of(spec: Spec, implementation: str) -> Callable:
    if implementation.startswith(FASTLM):
        return partial(spec.function, backend=implementation.removeprefix(FASTLM))
    if implementation == COMPILE:
        torch.compiler.reset()  # each size gets code for its own shape, as in a program that has one
        return torch.compile(next(iter(spec.peers.values())), dynamic=False)
    return spec.peers[implementation]


def outputs_of(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def leaves_of(spec: Spec, arguments: dict) -> dict[str, Tensor]:
    """The tensors of a call that get gradients, by name."""
    return {name: arguments[name].requires_grad_() for name in spec.differentiable if isinstance(arguments.get(name), Tensor)}


def output_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [seeded_normal(100 + i, out.shape, out.dtype) for i, out in enumerate(outputs)]


def step_of(spec: Spec, implementation: str, arguments: dict) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: forward and backward, or the forward alone where nothing gets a gradient. It has run once.

    The step returns the outputs, then the gradients.
    Raises Unavailable where a peer fails to import, to compile or to run, or fastlm does not have the backend here.
    """
    try:
        function = function_of(spec, implementation)
        leaves = tuple(leaves_of(spec, arguments).values())
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
