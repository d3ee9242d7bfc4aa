"""Measure the peak extra memory of a call in a process of its own. Linux only.

All that the call allocates counts, results and gradients included; its inputs are there before. device.py has the measurement.

The processes are forks of one that has imported what all need and computed nothing: this file, run as a program. None of them
outlives the run, however that ends: the program sees its standard input end, and Linux kills a process whose parent died.
"""

import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path

SECONDS = 120.0  # A measurement that takes longer is given up.
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Every block of 64 KiB and more comes from the system and goes back when freed, so that none is counted twice or not at all.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def peak_extra_bytes(target: str, *, seconds: float = SECONDS, **arguments) -> dict:
    """Measure the call that ``target``, "module:function", makes ready from ``arguments``. Give up after so many seconds.

    Return {"bytes": the peak, "result_bytes": the part of it that the call returns}, or {"why_not": the reason}.
    """
    if sys.platform != "linux":
        return {"why_not": "it is measured on Linux only"}
    found = _ask(target, arguments, seconds)
    if "bytes" in found and found["bytes"] < found["result_bytes"] / 2:
        return {"why_not": "it keeps its memory from call to call, so that none is seen to be taken"}
    return found


# ---- the process that asks --------------------------------------------------------------------------------------------------


@cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, __file__], env={**os.environ, **MALLOC}, text=True, **pipes)


def _ask(target: str, arguments: dict, seconds: float) -> dict:
    server = _server()
    print(json.dumps([target, arguments, seconds]), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    if not answer:
        _server.cache_clear()
        return {"why_not": f"the process that measures it ended with exit code {server.wait()}"}
    return json.loads(answer)


# ---- the process that forks, and its forks ----------------------------------------------------------------------------------


def serve() -> None:
    """Answer lines of the standard input, each [target, arguments, seconds], until it ends."""
    end_with_parent()
    importlib.import_module("torch._dynamo")
    importlib.import_module("suite.catalog").sections()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints is no answer.
    while line := _read_line():
        print(json.dumps(_answer(*json.loads(line))), file=answers, flush=True)


def _read_line() -> str:
    """Read a line of the standard input unbuffered, so that nothing but its end is left to be seen while a fork measures."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line.decode()


def _answer(target: str, arguments: dict, seconds: float) -> dict:
    """Measure in a fork. Exit where the standard input ends meanwhile: nobody is left to be answered."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_answer_in_fork, args=(sender, os.getpid(), target, arguments))
    child.start()
    sender.close()
    ready = wait([receiver, 0], seconds)
    if receiver not in ready:
        child.kill()
        if ready:
            sys.exit()
        found = {"why_not": f"it was not measured within {seconds:.3g} s"}
    else:
        try:
            found = receiver.recv()
        except EOFError:
            found = None
    child.join()
    return found or {"why_not": f"exit code {child.exitcode}"}


def end_with_parent(parent: int | None = None) -> None:
    """Have Linux kill this process when its parent dies. ``parent`` says who that was, as it may have died already."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(1)


def _answer_in_fork(sender: Connection, parent: int, target: str, arguments: dict) -> None:
    end_with_parent(parent)
    try:
        module, function = target.split(":")
        call = getattr(importlib.import_module(module), function)(**arguments)
        found = importlib.import_module("suite.device").measure_memory(call)
    except Exception as error:
        reason = str(error) if type(error).__name__ == "Unavailable" else f"{type(error).__name__}: {error}"
        found = {"why_not": reason.splitlines()[0]}
    sender.send(found)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # benchmarks/, where the modules of targets are
    serve()
