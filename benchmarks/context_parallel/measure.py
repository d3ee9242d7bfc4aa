"""Measure context-parallel attention: two processes of one thread each, against one process of two threads.

Every answer is checked before it is timed, on a shorter sequence. The ways take turns, so that a busy moment of the machine
meets all of them. The link between the processes, gloo on this machine, is measured too, for the model's lines.
"""

import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from suite.check import check_result
from suite.memory import MALLOC
from torch import Tensor

import fastlm
from context_parallel import steps
from context_parallel.processes import Processes
from context_parallel.steps import ALONE, ONE_PROCESS, Attend, Case
from context_parallel.traffic import AllToAll

RANKS = 2
LEAST_THROUGHPUT, MOST_MEMORY = 0.9, 0.6  # Goals of two processes, as shares of one process's.
CHECKED = 1024  # Answers are checked on sequences of at most so many rows, as float64 on the reference takes long.
EXCHANGED = tuple(1 << n for n in (10, 16, 20, 22, 24))  # bytes of the messages that measure the link
Say = Callable[[str], None]


class Turns(NamedTuple):
    """How often each way is timed: so many times, or until so many seconds have passed, and at least once."""

    number: int
    seconds: float = math.inf


class Measurement:
    """One process, and two, and the function under test, for a ``with`` block."""

    def __init__(self, attend: Attend, environment: Mapping[str, str] = MappingProxyType({})):
        self.attend = attend
        self.one, self.two = (Processes(n, RANKS // n, environment) for n in (1, RANKS))

    def __enter__(self):
        self.one.__enter__()
        self.two.__enter__()
        return self

    def __exit__(self, *exception):
        self.one.__exit__(*exception)
        self.two.__exit__(*exception)

    def run(self, function: Callable, case: Case, way: str) -> list:
        """Call a function of steps.py in one process or in two."""
        return (self.one if way == ONE_PROCESS else self.two).run(function, case, way, self.attend)

    def link(self) -> dict[str, float]:
        """Return the link's latency in seconds, and its bandwidth in bytes per second and direction."""
        seconds = {size: max(self.two.run(steps.exchange, size)) for size in EXCHANGED}
        smallest, largest = min(seconds), max(seconds)
        bandwidth = (largest - smallest) / (seconds[largest] - seconds[smallest])
        return {"latency": seconds[smallest], "bandwidth": bandwidth, "seconds": seconds}

    def errors(self, case: Case, way: str) -> dict[str, dict[str, float]]:
        """Return how wrong output and gradients are and may be, by the rule of fastlm/testing.py.

        Raises:
            AssertionError: one is more wrong than that.
        """
        case = case._replace(sequence=min(case.sequence, CHECKED))
        actual = [torch.cat(each, dim=2) for each in zip(*self.run(steps.answer, case, way))]
        plain, golden = (_reference(case, dtype) for dtype in (case.dtype, torch.float64))
        names = "output", "gradient of query", "gradient of key", "gradient of value"
        errors = {name: check_result(name, *each) for name, *each in zip(names, actual, plain, golden)}
        wrong = {name: error for name, error in errors.items() if not error["error"] <= error["allowed"]}
        if wrong:
            raise AssertionError(f"{way}, {case}: wrong: {wrong}")
        return errors

    def seconds(self, case: Case, way: str) -> float:
        """Return the time from the first process's beginning to the last one's end."""
        starts, ends = zip(*self.run(steps.timed, case, way))
        return max(ends) - min(starts)

    def turns(self, case: Case, ways: tuple[str, ...], turns: Turns) -> dict[str, list[float]]:
        """Time each way in turn, after a turn to warm up."""
        found, end = [], time.monotonic() + turns.seconds
        while len(found) < 2 or (len(found) <= turns.number and time.monotonic() < end):
            found.append({way: self.seconds(case, way) for way in ways})
        return {way: [turn[way] for turn in found[1:]] for way in ways}


def text_of(case: Case) -> str:
    dtype, kind = str(case.dtype).removeprefix("torch."), "causal" if case.causal else "full"
    return f"S{case.sequence} H{case.query_heads}/{case.key_heads} D{steps.HEAD_DIM} {dtype} {kind}"


def measure(
    cases: list[Case], ways: tuple[str, ...], turns: Turns, say: Say, attend: Attend = steps.distributed_attention
) -> dict:
    """Check and time every way in every case, and measure its memory and the link between the processes. Return JSON."""
    rows = {}
    with Measurement(attend) as measurement:
        say("the link")
        link = measurement.link()
        for case in cases:
            say(text_of(case))
            errors = {way: measurement.errors(case, way) for way in ways if way != ALONE}
            times = measurement.turns(case, ways, turns)
            shape = case._replace(dtype=str(case.dtype).removeprefix("torch."))._asdict()
            for way in ways:
                rows[case, way] = {**shape, "way": way, "seconds": times[way], "errors": errors.get(way, {})}
    with Measurement(attend, MALLOC) as measurement:
        for (case, way), row in rows.items():
            say(f"{text_of(case)}, {way}: memory")
            row["memory"] = measurement.run(steps.memory, case, way)
            if way != ALONE:
                row["layer_memory"] = measurement.run(steps.memory_of_layer, case, way)
    return {"link": link, "rows": list(rows.values())}


def case_of(row: dict) -> Case:
    fields = {name: row[name] for name in Case._fields}
    return Case(**fields | {"dtype": getattr(torch, row["dtype"])})


def rate_of(row: dict, seconds: float) -> float:
    """Return floating-point operations per second of a forward and backward of this row's case, all processes together."""
    layer = case_of(row).layer
    return sum(AllToAll(layer, 1).flops(0, backward) for backward in (False, True)) / seconds


def bytes_of(row: dict, what: str = "memory") -> int:
    """Return the bytes that a process needs at most, its inputs included: the largest of all processes.

    ``what`` is "memory" of attention alone, or "layer_memory".
    """
    return max(each["bytes"] + each["input_bytes"] for each in row[what])


def _reference(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    *leaves, gradient = [tensor.to(dtype) for tensor in steps.whole_inputs(case)]
    for leaf in leaves:
        leaf.requires_grad_()
    out = fastlm.attention(*leaves, causal=case.causal, backend="reference")
    return out.detach(), *torch.autograd.grad(out, leaves, gradient)
