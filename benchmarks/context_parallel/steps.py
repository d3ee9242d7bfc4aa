"""Make a step of attention, and time and measure it: what each process of measure.py runs. It imports little, to start soon."""

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from suite.device import CPU
from torch import Tensor, distributed

import fastlm
from context_parallel.layer import Layer, parts
from fastlm.distributed import attention as attention_over_ranks
from fastlm.testing import seeded_normal

HEAD_DIM = 64
ONE_PROCESS, ALONE = "one process", "without transfer"  # ways beside the methods
EXCHANGES, WARM_UP = 25, 3  # of each size of message
WARM_UP_ROWS = 512  # Before memory is measured, a call of so many rows brings in code, threads and connections.
Attend = Callable[..., Tensor]  # (query, key, value, *, causal, method), on this rank's rows


class Case(NamedTuple):
    """One size of self-attention, of one example."""

    sequence: int
    query_heads: int
    key_heads: int
    dtype: torch.dtype
    causal: bool

    @property
    def layer(self) -> Layer:
        return Layer(
            self.sequence, self.query_heads, self.key_heads, HEAD_DIM, itemsize=self.dtype.itemsize, causal=self.causal
        )


def distributed_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, method: str) -> Tensor:
    return attention_over_ranks(query, key, value, causal=causal, method=method)


@lru_cache(maxsize=1)
def whole_inputs(case: Case) -> tuple[Tensor, ...]:
    """Return query, key and value (1, H, S, D), and the output's gradient."""
    heads = case.query_heads, case.key_heads, case.key_heads
    tensors = [seeded_normal(i, (1, each, case.sequence, HEAD_DIM), case.dtype) for i, each in enumerate(heads)]
    return *tensors, seeded_normal(len(tensors), tensors[0].shape, case.dtype)


def part_of_inputs(case: Case, way: str) -> list[Tensor]:
    """Return this process's part of the inputs: its rows, or to compute without a transfer its heads of all rows."""
    rank, number = distributed.get_rank(), distributed.get_world_size()
    if way == ALONE:
        cut = [tensor[:, slice(*parts(tensor.shape[1], number)[rank])] for tensor in whole_inputs(case)]
    else:
        cut = [tensor[:, :, slice(*parts(case.sequence, number)[rank])] for tensor in whole_inputs(case)]
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in cut]


@lru_cache(maxsize=3)  # The ways take turns.
def step_of(case: Case, way: str, attend: Attend) -> tuple[Callable[[], tuple[Tensor, ...]], int]:
    """Return a forward and backward on this process's part, and the bytes of its inputs."""
    *leaves, gradient = part_of_inputs(case, way)
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = attended(case, way, attend, *leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, gradient)

    return step, sum(tensor.nbytes for tensor in (*leaves, gradient))


def attended(case: Case, way: str, attend: Attend, *tensors: Tensor) -> Tensor:
    """Attend with this process's query, key and value (1, H, L, D) in one of the ways."""
    if way in (ONE_PROCESS, ALONE):
        return fastlm.attention(*tensors, causal=case.causal)
    return attend(*tensors, causal=case.causal, method=way)


def layer_step_of(case: Case, way: str, attend: Attend) -> tuple[Callable[[], tuple[Tensor, Tensor]], int]:
    """Return a forward and backward of an attention layer as models have it, and the bytes of its inputs.

    Rows (1, L, W) of a width of all query heads are projected to queries, keys and values, which nobody else holds, and what
    is attended to is projected back. Weights and their gradients, which no way divides, stand outside.
    """
    first, last = parts(case.sequence, distributed.get_world_size())[distributed.get_rank()]
    heads, width = [case.query_heads, case.key_heads, case.key_heads], case.query_heads * HEAD_DIM
    project, unproject = (
        torch.nn.Linear(width, each * HEAD_DIM, bias=False, dtype=case.dtype) for each in (sum(heads), case.query_heads)
    )
    for weight in (project.weight, unproject.weight):
        weight.grad = torch.zeros_like(weight)
    rows, gradient = (seeded_normal(i, (1, last - first, width), case.dtype) for i in range(2))
    rows.requires_grad_()

    def projected() -> list[Tensor]:
        return project(rows).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2).split(heads, dim=1)

    def step() -> tuple[Tensor, Tensor]:
        out = unproject(attended(case, way, attend, *projected()).transpose(1, 2).flatten(2))
        rows.grad = None
        out.backward(gradient)
        return out.detach(), rows.grad

    return step, rows.nbytes + gradient.nbytes


def answer(case: Case, way: str, attend: Attend) -> tuple[Tensor, ...]:
    """Return this process's rows of the output and of the gradients of query, key and value."""
    step, _ = step_of(case, way, attend)
    return step()


def timed(case: Case, way: str, attend: Attend) -> tuple[float, float]:
    """Return when this process began and ended a step, on the machine's clock."""
    step, _ = step_of(case, way, attend)
    distributed.barrier()
    start = time.monotonic()
    step()
    return start, time.monotonic()


def memory(case: Case, way: str, attend: Attend) -> dict[str, int]:
    """Return the bytes of this process's inputs, and how far a step raises its resident set, results included."""
    return _memory(step_of, case, way, attend)


def memory_of_layer(case: Case, way: str, attend: Attend) -> dict[str, int]:
    """Return the same for the step of a whole layer."""
    return _memory(layer_step_of, case, way, attend)


def _memory(make_step: Callable, case: Case, way: str, attend: Attend) -> dict[str, int]:
    warm_up, _ = make_step(case._replace(sequence=WARM_UP_ROWS), way, attend)
    warm_up()
    step, input_bytes = make_step(case, way, attend)
    return {"bytes": CPU.peak_bytes(step)[0], "input_bytes": input_bytes}


def exchange(size: int) -> float:
    """Send so many bytes to the other process and receive as many from it. Return the median time."""
    other, gone, come = 1 - distributed.get_rank(), torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    times = []
    for _ in range(WARM_UP + EXCHANGES):
        distributed.barrier()
        start = time.monotonic()
        for work in (distributed.isend(gone, other), distributed.irecv(come, other)):
            work.wait()
        times.append(time.monotonic() - start)
    return statistics.median(times[WARM_UP:])
