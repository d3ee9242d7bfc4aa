"""Run a function in several processes of torch.distributed, over gloo on this machine.

    def total(rank, world, number):  # at the top level of a module, so that it can be pickled
        x = torch.tensor(number + rank)
        torch.distributed.all_reduce(x)
        return x

    assert run(total, 2, 5) == [11, 11]

A server process imports torch and fastlm once, and forks a process for each rank, which takes no time. Each has one thread.
"""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 120.0  # Seconds until all ranks of a run are killed.

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["pytest", "fastlm", "torch.distributed.tensor", "torch._inductor.config"]  # use_deterministic_algorithms imports the last
)


class RankError(AssertionError):
    """Report that a rank raised, died or was too slow; the message has its traceback."""


def run(function: Callable, world: int, *args, timeout: float = TIMEOUT, dead: tuple[int, ...] = ()) -> list:
    """Return what ``function(rank, world, *args)`` returns on each of ``world`` ranks, in their order.

    The ranks are a process group of gloo. Function, arguments and results are pickled, tensors by value. What the first rank
    to fail raised is raised here, and after ``timeout`` seconds nothing is left of any rank. The ranks in ``dead`` are expected
    to end their process without a result, which is None.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        task = pickle.dumps((function, args))
        ranks = [_start(task, rank, world, f"{folder}/store", timeout) for rank in range(world)]
        try:
            return _results(ranks, deadline, dead)
        finally:
            for process, connection in ranks:
                process.kill()
                process.join()
                connection.close()


def _start(task: bytes, rank: int, world: int, store: str, timeout: float) -> tuple[BaseProcess, Connection]:
    ours, theirs = _processes.Pipe()
    process = _processes.Process(target=_rank, args=(task, rank, world, store, timeout, theirs), daemon=True)
    process.start()
    theirs.close()  # So that the end of the rank's process ends the connection.
    return process, ours


def _results(ranks: list[tuple[BaseProcess, Connection]], deadline: float, dead: tuple[int, ...]) -> list:
    """Wait for the results of all ranks, or raise for the first that has none."""
    results, waiting = [None] * len(ranks), {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} took too long")
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                succeeded, result = pickle.loads(connection.recv_bytes())
            except EOFError:
                if rank not in dead:
                    raise RankError(f"rank {rank} died") from None
                continue
            if not succeeded:
                raise RankError(f"rank {rank} raised:\n{result}")
            results[rank] = result
    return results


def _rank(task: bytes, rank: int, world: int, store: str, timeout: float, connection: Connection) -> None:
    """Run one rank, and send (whether it succeeded, its result or its traceback)."""
    try:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)  # as in tests/conftest.py: fresh memory is filled with NaN
        torch.utils.deterministic.fill_uninitialized_memory = True
        function, args = pickle.loads(task)
        address = Path(store).as_uri()
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        answer = True, function(rank, world, *args)
    except BaseException:
        answer = False, traceback.format_exc()
    connection.send_bytes(pickle.dumps(answer))
    with contextlib.suppress(EOFError):
        connection.recv_bytes()  # Others may still need this rank, until our parent kills all, or is gone itself.
    os._exit(0)  # without destroying the group, for which all ranks would have to wait
