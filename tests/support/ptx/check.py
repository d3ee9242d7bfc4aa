"""Interpret the kernels for a GPU: their values and gradients obey the rule of errors, and planted faults are noticed.

PYTHONPATH=tests:benchmarks python -m support.ptx.check sm_80          # what `make test` interprets
PYTHONPATH=tests:benchmarks python -m support.ptx.check sm_80 --all    # every call in all its dtypes

A row of JSON is printed for each call and each fault, and the exit code is 1 if one is not as it should be. TRITON_INTERPRET
must not be set, because it would replace the compiler.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import chain

import torch
from support.oracle import Oracle
from triton.compiler import CompilationError

from .calls import CALLS, COVERING, PtxCall, spec_calls
from .faults import CALL, COMMON, FAULTS, PlantedFault
from .interpreter import Fault
from .launcher import Launcher, substituted


def check(call: PtxCall, dtype: torch.dtype, gpu: str) -> None:
    """Assert that values and gradients of a call are as good as plain PyTorch's, however late copies land."""
    oracle = call.oracle(dtype)
    for late in (False, True):
        with substituted(Launcher(gpu, late)):
            oracle.check(backend="triton")


def notice(fault: PlantedFault, oracle: Oracle, gpu: str) -> list[str]:
    """Return what is said of the forward with a fault where copies land early, and where they land late."""
    said = []
    for late in (False, True):
        try:
            with substituted(Launcher(gpu, late, edit=fault.plant)):
                oracle.check(backend="triton")
        except (Fault, AssertionError) as error:
            said.append(str(error))
    return said


def _fault_rows(gpu: str) -> Iterator[dict]:
    """Yield a row for each planted fault."""
    call = CALLS[CALL]
    oracle = call.oracle(call.dtypes[0], has_gradients=False)
    for name, fault in FAULTS.get(gpu, COMMON).items():
        said = notice(fault, oracle, gpu)
        missed = None if any(fault.notice in text for text in said) else f"expected {fault.notice!r}: {said}"
        yield {"gpu": gpu, "call": name, "error": missed}


def _call_rows(gpu: str, every: bool) -> Iterator[dict]:
    """Yield a row for each call and dtype."""
    calls = CALLS | spec_calls()
    for name in calls if every else COVERING.get(gpu, ()):
        call = calls[name]
        for dtype in call.dtypes if every else call.dtypes[:1]:
            yield _row(name, call, dtype, gpu)


def _row(name: str, call: PtxCall, dtype: torch.dtype, gpu: str) -> dict:
    """Check a call; return what is wrong, or None."""
    start = time.perf_counter()
    try:
        check(call, dtype, gpu)
        error = None
    except (Fault, AssertionError, ValueError, CompilationError):  # The row tells it, and the next call is checked.
        error = traceback.format_exc(limit=-1)
    seconds = round(time.perf_counter() - start, 1)
    return {"gpu": gpu, "call": name, "dtype": str(dtype), "error": error, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gpu")
    parser.add_argument("--all", action="store_true", help="every call in all its dtypes")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # With NaN.
    failed = False
    for row in chain(_call_rows(options.gpu, options.all), _fault_rows(options.gpu)):
        failed |= row["error"] is not None
        print(json.dumps(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
