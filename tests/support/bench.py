"""Make up a run of the benchmark, a clock that a test moves, and a stand-in for a slow row."""

import os
import time
from pathlib import Path

from support.processes import HANG

OWN, BASE, OTHER = "fastlm cpu", "SDPA", "eager"
FORWARD = "attention, forward"


def sleep_for_long(path: str) -> None:
    """Stand in for a slow row in memory.py's fork: leave the pids of the server and the fork in a file, and sleep."""
    Path(path).write_text(f"{os.getppid()} {os.getpid()}\n")
    time.sleep(HANG)


class Clock:
    """Count seconds that pass only when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def entry(
    implementation: str, times: list[float], op: str = FORWARD, workload: str = "B4 H8 S512", turn: int = 0, **extra
) -> dict:
    """Return a benchmark as pytest-benchmark writes it."""
    params = {"op": op, "workload": workload, "dtype": "float32", "turn": turn, "implementation": implementation}
    return {"params": params, "extra_info": extra, "stats": {"data": times}}


def made_up_run(*entries: dict, **more) -> dict:
    """Return the JSON of a run."""
    rates = {"float32": 200.0, "bfloat16": 400.0, "float16": 200.0, "float64": 100.0}
    machine = {
        "cpu": "<b>a CPU</b> & co_",
        "threads": 2,
        "date": "2026-01-01",
        "torch": "2.13.0",
        "fastlm": "0.1.0",
        "commit": "abc",
        "backends": {"cpu": "available", "cuda": "no"},
        "bandwidth_gb_s": 40.0,
        "gemm_gflop_s": rates,
        "fma_gflop_s": rates,
        "peak_gflop_s": rates,
    }
    return {"benchmarks": list(entries), "missing": [], "machine": machine, "command": "fastlm bench"} | more
