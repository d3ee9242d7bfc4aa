"""Run a step of `make gpu` in a process of its own, so that what it has found is kept whatever becomes of it or of the next.

This file imports nothing but Python, because it is to report that torch cannot be imported.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RESULT, LOG = "step.json", "log.txt"
PASSED, FAILED, OUT_OF_TIME = "passed", "failed", "out of time"
GPU_LOST = 75  # The exit code of a program whose GPU takes no more calls; it goes on where it was when run again.
MOST_RUNS = 5  # A step whose GPU is lost so often has failed.
GRACE = 20.0  # Seconds between asking a process to end and ending it.


@dataclass(frozen=True)
class Step:
    """A program that is run for at most so many seconds. It goes on from what an earlier run left in its folder."""

    name: str
    what: str  # for the reader
    seconds: float
    command: Callable[[Path], list[str]]  # makes the command line for the step's folder
    where: Path  # the folder that it runs in


def run_step(step: Step, out: Path, environment: dict[str, str], resume: bool) -> dict:
    """Run a step, unless ``resume`` and it is done; return its result, which is in its folder, too, beside its log."""
    folder = out / step.name
    if resume and (before := result_of(folder)) and before["status"] != OUT_OF_TIME:
        return before
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath(RESULT).unlink(missing_ok=True)
    start, code, runs = time.monotonic(), GPU_LOST, 0
    with folder.joinpath(LOG).open("a") as log:
        while code == GPU_LOST and runs < MOST_RUNS:
            runs, command = runs + 1, step.command(folder)  # It may ask for what the run before has left.
            code = _run(command, step.where, environment, start + step.seconds, log)
    status = OUT_OF_TIME if code is None else FAILED if code else PASSED
    seconds = round(time.monotonic() - start, 1)
    result = {"step": step.name, "what": step.what, "status": status, "exit code": code, "seconds": seconds, "runs": runs}
    folder.joinpath(RESULT).write_text(json.dumps(result | {"command": command}, indent=1))
    return result


def result_of(folder: Path) -> dict | None:
    """Return the result of a step that was run before, or None."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def _run(command: list[str], where: Path, environment: dict[str, str], end: float, log) -> int | None:
    """Run a command until it ends, and return its exit code, or None where it did not end in time.

    What it prints goes to the terminal and to the log. It is first interrupted, so that it can keep what it has.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=where, env=environment, start_new_session=True, **options)
    reader = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    reader.start()
    in_time = True
    try:
        process.wait(max(0.1, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
        in_time = False
        _end(process)
        if isinstance(stop, KeyboardInterrupt):
            raise
    _signal(process, signal.SIGKILL)  # What it has left behind holds the pipe open.
    reader.join()
    return process.returncode if in_time else None


def _copy(source, log) -> None:
    """Copy lines to the terminal and to the log."""
    for line in source:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()


def _end(process: subprocess.Popen) -> None:
    """Interrupt a process, and end it where it does not end itself."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and to those that it has started."""
    with contextlib.suppress(ProcessLookupError):  # They have ended.
        os.killpg(process.pid, number)
