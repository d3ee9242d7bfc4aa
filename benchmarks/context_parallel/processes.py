"""Run functions in several processes of one group of torch.distributed, over gloo, on this machine.

The processes are this file, run as a program: they wait on their standard input for functions, and end when it ends.
"""

import datetime
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from types import MappingProxyType

TIMEOUT = 120.0  # Seconds that a collective waits for the other processes.


class Processes:
    """So many processes, each of so many threads, for a ``with`` block. ``environment`` has more variables for them."""

    def __init__(self, number: int, threads: int, environment: Mapping[str, str] = MappingProxyType({})):
        self.number, self.threads = number, threads
        self.environment = {**os.environ, **environment, "OMP_NUM_THREADS": str(threads)}

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.processes = [
            subprocess.Popen([sys.executable, __file__], env=self.environment, **pipes) for _ in range(self.number)
        ]
        for rank, process in enumerate(self.processes):
            self._send(process, (sys.path, rank, self.number, self.threads, f"{self.folder.name}/store"))
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            if exception[0]:
                process.kill()  # It may wait for another that has failed.
            process.stdin.close()
        for process in self.processes:
            process.wait()
            process.stdout.close()
        self.folder.cleanup()

    def run(self, function: Callable, *arguments) -> list:
        """Call a module's function in every process, and return what each returns, in the order of their ranks.

        Raises:
            RuntimeError: a process failed, with its traceback, or ended.
        """
        for process in self.processes:
            self._send(process, (function, arguments))
        answers, rank_of = {}, {process.stdout: rank for rank, process in enumerate(self.processes)}
        while len(answers) < self.number:  # The first that fails ends it: the others may wait for that one.
            for answered in wait([stdout for stdout, rank in rank_of.items() if rank not in answers]):
                answers[rank_of[answered]] = self._answer(rank_of[answered])
        return [answers[rank] for rank in range(self.number)]

    def _send(self, process: subprocess.Popen, message) -> None:
        try:
            pickle.dump(message, process.stdin)
            process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"a process ended with exit code {process.wait()}") from error

    def _answer(self, rank: int):
        process = self.processes[rank]
        try:
            result, error = pickle.load(process.stdout)
        except EOFError:
            result, error = None, f"it ended with exit code {process.wait()}"
        if error:
            raise RuntimeError(f"process {rank} of {self.number}: {error}")
        return result


def serve() -> None:
    """Join the group, and answer each (function, arguments) of the standard input with (result, traceback)."""
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints is no answer.
    path, rank, number, threads, store = pickle.load(messages)
    sys.path[:] = path
    import torch
    from suite.memory import end_with_parent

    end_with_parent()
    torch.set_num_threads(threads)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    torch.distributed.init_process_group("gloo", f"file://{store}", timeout, world_size=number, rank=rank)
    while True:
        try:
            function, arguments = pickle.load(messages)
        except EOFError:
            break
        try:
            answer = function(*arguments), None
        except (AssertionError, RuntimeError, TypeError, ValueError):  # fastlm's and torch's; any other ends the process
            answer = None, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # benchmarks/, until the parent says what it imports from
    serve()
