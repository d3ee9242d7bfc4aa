"""What is known of a deferred tensor: the calls of torch that it stands for, and their result once somebody needs it."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...ops.attention.dropout import drop
from ...ops.noise import seed_tensor
from ...ops.torch_op import direct_apply
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
        """Bring the modes back, and let nobody else see torch's calls."""
        with ExitStack() as stack:
            stack.enter_context(torch._C.DisableTorchFunction())
            stack.enter_context(_disable_current_modes())
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(
                torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False)
            )
            yield


ADVICE = "fastlm.use(handwritten=False) leaves such code to torch"


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
        self._states = [(tensor, tensor._version, tensor.requires_grad) for tensor in tensors if not tensor.is_inference()]
        self._children: list[weakref.ref[Record]] = []
        self.length = 1
        self.sources: tuple[Tensor, ...] = ()  # the tensors that get a gradient
        if parent is not None:
            parent._children.append(weakref.ref(self))
            self.length, self.sources = parent.length + 1, parent.sources
        if origin.context.grad:
            for tensor in tensors:
                if tensor.requires_grad and not any(tensor is known for known in self.sources):
                    self.sources += (tensor,)
        self.met_values = False
        self._seed: Tensor | None = None  # of the dropout, if this is one and a call of attention has drawn it
        self._result: tuple[Tensor, int | None] | None = None  # with its version, which tensors of inference mode lack
        self._private: tuple[list[Tensor], Tensor] | None = None

    # ---- torch's own calls --------------------------------------------------------------------------------------------------

    def is_computed(self) -> bool:
        """Tell whether the result is known, or that of a tensor whose memory it shares."""
        record = self
        while record._is_view and record._result is None and record._parent is not None:
            record = record._parent
        return record._result is not None or record._private is not None

    def result(self) -> Tensor:
        """Return what torch's own calls give, in their order."""
        if self._result is None:
            self._check()
            with self.origin.context.again():
                self._compute()
        return self._result[0]

    def private(self) -> tuple[list[Tensor], Tensor]:
        """Return (a stand-in for each of the sources, the result computed of them).

        No other graph has a part of this one, so that a function of autograd can differentiate it within its backward.
        """
        if self._private is None:
            self._check()
            with self.origin.context.again():
                leaves = [source.view_as(source) for source in self.sources]
                result = self._call_again({id(source): leaf for source, leaf in zip(self.sources, leaves)})
            self._private = leaves, result
        return self._private

    def value(self) -> Tensor:
        """Return the result without a place in a graph, for code below Python and code without gradients."""
        result = self.private()[1] if self.sources and self._result is None else self.result()
        return result.detach() if result.requires_grad else result

    def _compute(self) -> Tensor:
        if self._result is None:
            if self._private is not None:
                result = in_graph(self, self.value, *self.sources)
            else:
                result = self._call(self._parent and self._parent._compute(), self._args, self._kwargs)
            self._result = result, None if result.is_inference() else result._version
            if not self.sources:  # Nothing can make it necessary to compute this again.
                self._parent = self._parent if self._is_view else None
                self._args, self._kwargs, self._states = (), {}, []
        return self._result[0]

    def _call_again(self, leaves: dict[int, Tensor]) -> Tensor:
        if self._drops() and self._seed is None and (self._result or self._private):
            raise RuntimeError(f"weights were dropped before a function of autograd got them; {ADVICE}")
        args = tuple(leaves.get(id(arg), arg) for arg in self._args)
        kwargs = {name: leaves.get(id(arg), arg) for name, arg in self._kwargs.items()}
        return self._call(self._parent and self._parent._call_again(leaves), args, kwargs)

    def _call(self, of_parent: Tensor | None, args: tuple, kwargs: dict) -> Tensor:
        if of_parent is not None:
            args = (*args[: self._at], of_parent, *args[self._at :])
        return self._function(*args, **kwargs) if self._seed is None else drop(args[0], self._seed, self.chain.dropout_p)

    def _drops(self) -> bool:
        return self.chain.dropout_p > 0.0 and self._parent.chain.dropout_p == 0.0

    # ---- changes in place ---------------------------------------------------------------------------------------------------

    def has_dependents(self) -> bool:
        """Tell whether something was recorded of this tensor, or of one that shares its memory, as it is now."""
        return self._base()._has_children()

    def compute_dependents(self) -> None:
        """Compute what was recorded of this tensor, and of all that share its memory, before somebody writes into it."""
        self._base()._compute_children()

    def _base(self) -> "Record":
        record = self
        while record._is_view and record._parent is not None:
            record = record._parent
        return record

    def _alive(self) -> "list[Record]":
        children = (child() for child in self._children)
        return [child for child in children if child is not None]

    def _has_children(self) -> bool:
        return any(not child._is_view or child._has_children() for child in self._alive())

    def _compute_children(self) -> None:
        for child in self._alive():
            if child._is_view:
                child._compute_children()
            elif not child.is_computed():
                child.result()

    def _check(self) -> None:
        """Raise an error if what torch would have computed is lost, because a tensor has changed since it was recorded."""
        line = self._line()
        states = [state for record in line for state in record._states]
        changed = [tensor for tensor, version, _ in states if tensor._version != version]
        if self.origin.context.grad:
            changed += [tensor for tensor, _, required in states if tensor.requires_grad != required]
        known = line[-1]._parent
        if known is not None and known._result is not None and not all(record._is_view for record in line):
            result, version = known._result
            changed += [result] if version is not None and result._version != version else []
        if changed:
            raise RuntimeError(
                f"a tensor {tuple(changed[0].shape)} of hand-written attention was changed in place before its scores were "
                f"used, which fastlm computes only then; {ADVICE}"
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
        for record in line:
            record.met_values = True
        return out, None


class _InGraph(torch.autograd.Function):
    """Give a tensor the place in the graph that a record's result has."""

    @staticmethod
    def forward(ctx, record: Record, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        ctx.record = record
        return make()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        leaves, result = ctx.record.private()
        options = {"create_graph": torch.is_grad_enabled(), "retain_graph": True, "allow_unused": True}
        return None, None, *torch.autograd.grad(result, leaves, grad, **options)


in_graph = direct_apply(_InGraph)
