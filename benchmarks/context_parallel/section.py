"""Measure the report's section on context parallelism: one size, by both methods, in about twenty seconds."""

import os
import sys
from collections.abc import Callable

import torch

from context_parallel.measure import RANKS, Turns, measure
from context_parallel.steps import ONE_PROCESS, Case

WAYS = ONE_PROCESS, "all-to-all", "ring"
CASE = Case(8192, 4, 2, torch.float32, True)
TURNS = Turns(3, seconds=8.0)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_section(say: Callable[[str], None]) -> dict:
    """Return what measure.py found, or {"why_not": a reason of the machine's}, or {"failed": a fault of fastlm's own}."""
    if sys.platform != "linux":
        return {"why_not": "memory is measured on Linux only"}
    if CORES < RANKS:
        return {"why_not": f"{RANKS} processes need as many cores"}
    try:
        return measure([CASE], WAYS, TURNS, say)
    except (AssertionError, RuntimeError) as error:
        return {"failed": str(error)}
