"""What is known of a deferred tensor: the calls of torch that it stands for, and their result once somebody needs it."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.noise import seed_tensor
from ...reference.attention import keep_mask, keep_scale
from .chain import Chain


class Context(NamedTuple):
    """The modes of torch that decide what a call on tensors of a device does."""

    device: str
    grad: bool
    inference: bool
    autocast: torch.dtype | None  # None: off

    @classmethod
    def current(cls, device: str) -> "Context":
        """Return the modes that hold now."""
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(device, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    def holds(self) -> bool:
        """Tell whether the modes are the same now."""
        if torch.is_grad_enabled() is not self.grad or torch.is_inference_mode_enabled() is not self.inference:
            return False
        if not torch.is_autocast_enabled(self.device):
            return self.autocast is None
        return torch.get_autocast_dtype(self.device) is self.autocast

    @contextmanager
    def again(self) -> Iterator[None]:
        """Bring the modes back, and let no function of Python see torch's calls."""
        with ExitStack() as stack:
            stack.enter_context(torch._C.DisableTorchFunction())
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(
                torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False)
            )
            yield


class Origin:
    """The product that records begin with, and what came of it for the report of a block."""

    def __init__(self, count: Callable[[str | None], None], context: Context) -> None:
        self.context = context
        self._count: Callable[[str | None], None] | None = count

    def settle(self, reason: str | None) -> None:
        """Count the first of what happens: a call of attention (None), or the reason why there is none."""
        if self._count is not None:
            self._count(reason)
            self._count = None


class Record:
    """A call of torch on the result of ``parent``, and its own result once somebody needs it."""

    def __init__(
        self,
        origin: Origin,
        parent: "Record | None",
        function: Callable,
        args: tuple,
        kwargs: dict,
        tensors: list[Tensor],
        chain: Chain,
        at: int = 0,
        is_view: bool = False,
    ) -> None:
        """Record ``function(*args, **kwargs)``, where the parent's result belongs before position ``at`` of ``args``.

        ``tensors`` are those among the arguments, and ``chain`` is what all calls up to this one amount to.
        """
        self.origin, self.chain = origin, chain
        self._parent, self._function, self._args, self._kwargs, self._at = parent, function, args, kwargs, at
        self._is_view = is_view
        self._versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        self.is_needed = False  # by another record
        self.length = 1
        self.sources: tuple[Tensor, ...] = ()  # the tensors that get a gradient
        if parent is not None:
            parent.is_needed = True
            self.length, self.sources = parent.length + 1, parent.sources
        if origin.context.grad:
            for tensor in tensors:
                if tensor.requires_grad and not any(tensor is known for known in self.sources):
                    self.sources += (tensor,)
        self._seed: Tensor | None = None  # of the dropout, if this is one and a call of attention has drawn it
        self._result: tuple[Tensor, int | None] | None = None  # with its version, which tensors of inference mode lack

    # ---- torch's own calls --------------------------------------------------------------------------------------------------

    def is_computed(self) -> bool:
        """Tell whether the result is known."""
        return self._result is not None

    def result(self) -> Tensor:
        """Return what torch's own calls give, in their order."""
        if self._result is None:
            self._check()
            with self.origin.context.again():
                self._compute()
        return self._result[0]

    def recompute(self, leaves: dict[int, Tensor]) -> Tensor:
        """Compute the result again, with other tensors in the place of those with these ids."""
        with self.origin.context.again():
            return self._call_again(leaves)

    def _compute(self) -> Tensor:
        if self._result is None:
            result = self._call(self._parent and self._parent._compute(), self._args, self._kwargs)
            self._result = result, None if result.is_inference() else result._version
            if not self.sources:  # Nothing can make it necessary to compute this again.
                self._parent, self._args, self._kwargs, self._versions = None, (), {}, []
        return self._result[0]

    def _call_again(self, leaves: dict[int, Tensor]) -> Tensor:
        args = tuple(leaves.get(id(arg), arg) for arg in self._args)
        kwargs = {name: leaves.get(id(arg), arg) for name, arg in self._kwargs.items()}
        return self._call(self._parent and self._parent._call_again(leaves), args, kwargs)

    def _call(self, of_parent: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
        if of_parent is not None:
            args = (*args[: self._at], of_parent, *args[self._at :])
        return self._function(*args, **kwargs) if self._seed is None else self._drop(args[0])

    def _drops(self) -> bool:
        return self.chain.dropout_p > 0.0 and self._parent.chain.dropout_p == 0.0

    def _drop(self, weights: Tensor) -> Tensor:
        """Drop the weights that a call of attention has dropped."""
        *lead, rows, keys = weights.shape
        p = self.chain.dropout_p
        kept = keep_mask(self._seed, p, 1, math.prod(lead), rows, keys, device=weights.device).view(weights.shape)
        return weights.masked_fill(kept.logical_not(), 0.0) * keep_scale(p)

    def _check(self) -> None:
        """Raise an error if a tensor has changed since it was recorded, because what torch would have computed is lost then."""
        line = self._line()
        changed = [tensor for record in line for tensor, version in record._versions if tensor._version != version]
        known = line[-1]._parent
        if known is not None and not all(record._is_view for record in line):
            result, version = known._result
            changed += [result] if version is not None and result._version != version else []
        if changed:
            raise RuntimeError(
                f"a tensor {tuple(changed[0].shape)} of hand-written attention was changed in place before its scores were "
                "used, which fastlm computes only then; fastlm.use(handwritten=False) leaves such code to torch"
            )

    def _line(self) -> "list[Record]":
        """Return this record and those before it whose results are not known."""
        line = [self]
        while line[-1]._parent is not None and not line[-1]._parent.is_computed():
            line.append(line[-1]._parent)
        return line

    # ---- one call of attention ----------------------------------------------------------------------------------------------

    def attend(self, value: Tensor) -> tuple[Tensor | None, str | None]:
        """Return (the product with ``value``, None), or (None, why it must be computed from the weights)."""
        line = self._line()
        if self.is_computed() or line[-1]._parent is not None:
            return None, "hand-written scores or weights were read before they met the values"
        reason = self.chain.why_not(value)
        if reason is not None:
            return None, reason
        self._check()
        dropout = next((record for record in line if record._drops()), None)
        seed = None if dropout is None else dropout._seed
        if dropout is not None and seed is None:
            seed = seed_tensor(None, self.chain.query)
        out = self.chain.attend(value, seed)
        if out is None:
            return None, "hidden scores count beside the others in the softmax, or views of the scores do not fit each other"
        if dropout is not None:
            dropout._seed = seed  # Whoever reads the weights gets those that were used.
        return out, None
