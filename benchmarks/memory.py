"""Peak extra memory of a call, in a process of its own: how far its resident set rises above what it was before the call.

Counted is all that the call allocates, results and gradients included; its inputs are there before. Linux only: the high-water
mark of the resident set is reset by writing 5 to /proc/self/clear_refs (man 5 proc).

    python benchmarks/memory.py rows:fresh_step '{"op": "normal", "workload": "1,048,576", …}'
"""

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")
# Every block of 64 KiB and more comes from the system and goes back when freed, so that none is counted twice or not at all.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
WARM_UPS = 2


def peak_extra_bytes(target: str, **arguments) -> dict:
    """Measure the call that ``target``, "module:function", makes ready from ``arguments``.

    {"bytes": peak, "result_bytes": what of it are the tensors that the call returns}; or {"why_not": reason}.
    """
    if not CLEAR_REFS.exists():
        return {"why_not": f"measured on Linux only: no {CLEAR_REFS}"}
    command = [sys.executable, __file__, target, json.dumps(arguments)]
    child = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip() or f"exit code {child.returncode}").splitlines()[-1]
        return {"why_not": last.removeprefix("rows.Unavailable: ")}
    found = json.loads(child.stdout.splitlines()[-1])
    if found["bytes"] < found["result_bytes"] / 2:
        return {"why_not": "it keeps its memory from call to call, so that none is seen to be taken"}
    return found


def _status(field: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _measure(call: Callable) -> dict:
    """The warm-ups bring in code pages, thread stacks and compiled kernels; what they leave in the heap goes back."""
    for _ in range(WARM_UPS):
        call()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    CLEAR_REFS.write_text("5")
    before = _status("VmRSS")
    result = call()  # kept, so that it counts
    peak = max(0, _status("VmHWM") - before)
    return {"bytes": peak, "result_bytes": sum(t.nbytes for t in result) if isinstance(result, tuple) else 0}


def main(target: str, arguments: str) -> None:
    module, function = target.split(":")
    call = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(_measure(call)))


if __name__ == "__main__":
    main(*sys.argv[1:])
