"""Which backend runs a call, in which order, and why.

An op lists its implementations, fastest first; each says of a call why it cannot run it, or None. The first that can, does.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import cpu, cuda, triton

NAMES = ("cuda", "triton", "cpu", "reference")
LARGE_CALL = 1 << 16  # elements from which running the reference on a CPU is worth a warning
DEFAULT = os.environ.get("FASTLM_BACKEND") or None
_warned: set[str] = set()


class UnsupportedError(NotImplementedError):
    """The backend that was asked for cannot run this call; the message says which argument stops it."""


@dataclass(frozen=True)
class Implementation:
    """One backend's way to run an op."""

    backend: str
    run: Callable
    why_not: Callable[..., str | None]  # takes the tensors that decide, the op's first one first; None where it can run


@dataclass(eq=False)
class Explanation(Exception):
    """Which backend runs a call, and why each faster one does not. Printable.

    To explain a call is to make it with this object as its backend: all checks run as ever, and `select` raises it, filled,
    in place of running anything.
    """

    op: str
    requested: str | None = None
    backend: str | None = None  # None: the requested backend cannot run the call
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
    """Return the function that runs this call: the named backend's, or the fastest one's that can.

    ``tensors`` are those that decide; ``reference_only`` says why the call must be made of torch's own ops, or is None.
    """
    if reference_only is not None:
        implementations = [_barred(i, reference_only) if i.backend != "reference" else i for i in implementations]
    if isinstance(backend, Explanation):
        raise _explained(implementations, tensors, backend)
    requested = backend or DEFAULT
    if requested is not None:
        return _named(op, implementations, tensors, requested)
    for implementation in implementations:
        if implementation.why_not(*tensors) is None:
            if implementation.backend == "reference":
                _warn_of_reference(op, implementations, tensors)
            return implementation.run
    raise UnsupportedError(f"{op}: no backend runs on {tensors[0].device}")


def _barred(implementation: Implementation, reason: str) -> Implementation:
    """The implementation, which cannot take this call for a reason that does not lie in its tensors' kind."""
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
        reason = f"{requested!r} was asked for" if other else implementation.why_not(*tensors)
        if reason is None:
            explanation.backend = implementation.backend
            return explanation
        explanation.why_not[implementation.backend] = reason
    return explanation


def _warn_of_reference(op, implementations, tensors) -> None:
    """Say once per op and device that a call which deserves a kernel runs on the reference: never silently slow."""
    tensor = tensors[0]
    deserves = tensor.device.type != "cpu" or tensor.numel() >= LARGE_CALL
    key = f"{op} on {tensor.device.type}"
    if deserves and key not in _warned and tensor.device.type != "meta":
        _warned.add(key)
        reasons = "; ".join(f"{i.backend}: {i.why_not(*tensors)}" for i in implementations if i.backend != "reference")
        message = f"fastlm: {key} runs on the slow PyTorch reference ({reasons})"
        warnings.warn(message, stacklevel=5)  # at the caller of the public function


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Which backend would run ``function(*args, **kwargs)``, and why each faster one would not. Nothing is computed.

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
    """Each backend, fastest first, with 'available' or the reason why it is not."""
    return {
        "cuda": cuda.state(),
        "triton": triton.state(),
        "cpu": cpu.state(),
        "reference": "available (plain PyTorch on any device)",
    }
