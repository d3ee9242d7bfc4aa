"""Tell `fastlm.watch` of the calls of attention that a thread makes.

Each thread has a stack of the watched modules whose forward it is in, which nn/running.py fills. `batched.run` asks for the
observers of a call, computes the statistics if there are any, and tells them. What watches nothing costs one look at a number.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ...backend.cpu import constant_when_compiled
from ..torch_op import is_eager, is_ordinary
from .call import AttentionCall


class Watch(Protocol):
    """Collect statistics. Entries of a watch that is no longer open are skipped."""

    is_open: bool
    key_mass: bool  # whether it needs the mass of the keys


class Observer(Protocol):
    """Stand on the stack for a module whose forward runs, and pass to its watch what happens there."""

    watch: Watch
    name: str  # the module's, in the watched model

    def record(self, call: AttentionCall, entropy: Tensor, max_logit: Tensor, key_mass: Tensor) -> None:
        """Take the statistics of a call: (B, Hq, Lq) twice, and (B, Hq, Lk) where the watch needs it."""

    def miss(self, reason: str) -> None:
        """Take note of a call without statistics."""


class _Stack(threading.local):
    def __init__(self) -> None:
        self.observers: list[Observer] = []


_stack = _Stack()
_lock = threading.Lock()
open_watches = 0  # of all threads


def count_open(change: int) -> None:
    """Note that a watch was opened (1) or closed (-1)."""
    global open_watches
    with _lock:
        open_watches += change


@constant_when_compiled
def any_open() -> bool:
    """Tell whether anything in the process is watched. Code that torch.compile traces must not read ``open_watches`` itself."""
    return open_watches > 0


def stack() -> list[Observer]:
    """Return this thread's stack of running modules, to be changed in place."""
    return _stack.observers


def current() -> tuple[Observer, ...]:
    """Return the innermost observer of each open watch, for a call that this thread makes now.

    There is none in a graph that torch.compile traces, nor in a backward: what a checkpoint computes again there was counted
    in the forward.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return ()
    innermost: dict[int, Observer] = {}
    for observer in reversed(_stack.observers):
        if observer.watch.is_open:
            innermost.setdefault(id(observer.watch), observer)
    return tuple(innermost.values())


def why_not(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why no statistics can be kept of a call with these tensors, or None."""
    if not is_eager():
        return "they were inside torch.func, forward mode, a TorchDispatchMode or a tracer"
    if not all(tensor is None or is_ordinary(tensor) for tensor in tensors):
        return "their tensors were of a subclass, or on a device that fastlm has no kernels for"
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph was captured"
    return None


def miss(reason: str) -> None:
    """Tell whoever watches of a call without statistics."""
    for observer in current() if any_open() else ():
        observer.miss(reason)


SPREAD = "they were spread over ranks, each of which sees a part"


@contextmanager
def missed(reason: str) -> Iterator[None]:
    """Tell whoever watches of a call without statistics, and hide the calls that it consists of."""
    if torch.compiler.is_compiling():
        yield
        return
    miss(reason)
    hidden, _stack.observers = _stack.observers, []
    try:
        yield
    finally:
        _stack.observers = hidden
