"""Choose the backend that runs a call, and explain the choice.

An op lists its implementations, fastest first. Each tells why it cannot run a call, or None; the first one that can, runs it.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import cpu, cuda, triton

NAMES = ("cuda", "triton", "cpu", "reference")
LARGE_CALL = 1 << 16  # From this many elements on, running the reference on a CPU is worth a warning.
DEFAULT = os.environ.get("FASTLM_BACKEND") or None
_warned: set[str] = set()


class UnsupportedError(NotImplementedError):
    """Report that the named backend cannot run this call; the message says which argument stops it."""


@dataclass(frozen=True)
class Implementation:
    """Hold one backend's function for an op, and its test of a call."""

    backend: str
    run: Callable
    why_not: Callable[..., str | None]  # Takes the deciding tensors, the op's first input first; None: it can run.
    why_slower: Callable[..., str | None] | None = None  # Why the next implementation is faster for these tensors, or None.
    is_torch: bool = False  # torch's own op, so that a call on the reference is no slow one

    def why_not_chosen(self, *tensors: torch.Tensor) -> str | None:
        """Return why a call that names no backend does not run here, or None."""
        return self.why_not(*tensors) or (self.why_slower and self.why_slower(*tensors))


@dataclass(eq=False)
class Explanation(Exception):
    """Tell which backend runs a call, and why each faster one does not. Printable.

    `explain` passes this object as the backend of an ordinary call: all checks run as ever; then `select` fills and raises it,
    and runs nothing.
    """

    op: str
    requested: str | None = None
    backend: str | None = None  # None: the named backend cannot run the call.
    why_not: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"{self.op} runs on the backend {self.backend!r}" if self.backend else f"{self.op} cannot run"
        return "\n".join([head] + [f"  not on {name!r}: {reason}" for name, reason in self.why_not.items()])

    __repr__ = __str__


def select(
    op: str,
    implementations: Sequence[Implementation],
    tensors: tuple[torch.Tensor, ...],
    backend: str | None,
    reference_only: str | None = None,
) -> Callable:
    """Return the function that runs this call: that of the named backend, or of the fastest backend that can run it.

    ``tensors`` decide which backends can. ``reference_only`` says why only torch's own ops may run the call, or is None.
    """
    if reference_only is not None:
        implementations = [_barred(i, reference_only) if i.backend != "reference" else i for i in implementations]
    if isinstance(backend, Explanation):
        raise _explained(implementations, tensors, backend)
    requested = backend or DEFAULT
    if requested is not None:
        return _named(op, implementations, tensors, requested)
    for implementation in implementations:
        if implementation.why_not_chosen(*tensors) is None:
            if implementation.backend == "reference" and not implementation.is_torch:
                _warn_of_reference(op, implementations, tensors)
            return implementation.run
    raise UnsupportedError(f"{op}: no backend runs on {tensors[0].device}")


def _barred(implementation: Implementation, reason: str) -> Implementation:
    """Return the implementation with a ``why_not`` that always gives ``reason``, which does not depend on the tensors."""
    return Implementation(
        implementation.backend, implementation.run, lambda *tensors: implementation.why_not(*tensors) or reason
    )


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend (or FASTLM_BACKEND) must be one of {', '.join(NAMES)}; got {name!r}")


def _named(op: str, implementations: Sequence[Implementation], tensors: tuple[torch.Tensor, ...], name: str) -> Callable:
    _check_name(name)
    for implementation in implementations:
        if implementation.backend == name:
            if reason := implementation.why_not(*tensors):
                raise UnsupportedError(f"{op} cannot run on backend {name!r}: {reason}")
            return implementation.run
    raise UnsupportedError(f"{op} has no kernel for backend {name!r} in this version")


def _explained(
    implementations: Sequence[Implementation], tensors: tuple[torch.Tensor, ...], explanation: Explanation
) -> Explanation:
    requested = explanation.requested or DEFAULT
    if requested is not None:
        _check_name(requested)
    for implementation in implementations:
        other = requested not in (None, implementation.backend)
        why_not = implementation.why_not_chosen if requested is None else implementation.why_not
        reason = f"{requested!r} was asked for" if other else why_not(*tensors)
        if reason is None:
            explanation.backend = implementation.backend
            return explanation
        explanation.why_not[implementation.backend] = reason
    return explanation


def _warn_of_reference(op, implementations, tensors) -> None:
    """Warn once per op and device that a call worth a kernel runs on the reference, so that nothing is slow in silence."""
    tensor = tensors[0]
    deserves = tensor.device.type != "cpu" or tensor.numel() >= LARGE_CALL
    key = f"{op} on {tensor.device.type}"
    if deserves and key not in _warned and tensor.device.type != "meta":
        _warned.add(key)
        reasons = "; ".join(f"{i.backend}: {i.why_not(*tensors)}" for i in implementations if i.backend != "reference")
        message = f"fastlm: {key} runs on the slow PyTorch reference ({reasons})"
        warnings.warn(message, stacklevel=5)  # The warning points at the caller of the public function.


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Tell which backend would run ``function(*args, **kwargs)``, and why each faster one would not. Nothing is computed.

    >>> print(fastlm.explain(fastlm.gaussian_kl, mu, logvar))
    gaussian_kl runs on the backend 'cpu'
      not on 'cuda': the tensors are on cpu
    """
    explanation = Explanation(getattr(function, "__name__", "?"), kwargs.pop("backend", None))
    try:
        function(*args, backend=explanation, **kwargs)
    except Explanation:
        return explanation
    raise TypeError(f"function must be one of fastlm's ops, which take a backend; got {function!r}")


def backends() -> dict[str, str]:
    """Return each backend, fastest first, with 'available' or the reason why it is not."""
    return {
        "cuda": cuda.state(),
        "triton": triton.state(),
        "cpu": cpu.state(),
        "reference": "available (plain PyTorch on any device)",
    }
