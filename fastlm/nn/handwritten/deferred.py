"""A tensor that is computed when somebody needs it: scores and weights of hand-written attention.

A product of queries and transposed keys gives a `Deferred`, and so do the steps of attention that follow. Where weights meet
their values, both are one call of attention, and the scores are never stored. Whatever else touches a deferred tensor gets what
torch's own calls give, in their order.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_map

from ...ops.torch_op import direct_apply, is_eager, is_ordinary
from .. import blocks
from .products import READERS, read, scores_of, weights_first
from .record import ADVICE, Context, Origin, Record, in_graph
from .steps import SAME, STEPS, Step

_LONGEST = 64  # records that depend on each other; attention takes about ten
_as_torch_does = torch._C.DisableTorchFunctionSubclass  # Within it, a deferred tensor is one like any other.


class Deferred(Tensor):
    """Scores or weights with the shape, strides, dtype and device that torch gives them, and no memory."""

    _record: Record
    _node: object  # The function of autograd that returned it, or None. Whoever makes it another's has changed the tensor.
    _views: list[weakref.ref]  # the deferred tensors that would share its memory, itself included

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(torchs_own(func), args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Compute with the values. This is how C++ code and functions of autograd see the tensor."""

        def value(arg):
            if not isinstance(arg, Deferred):
                return arg
            with enable_reentrant_dispatch():
                if func._schema.is_mutable:
                    arg._record.compute_dependents()
                arg._record.origin.settle(f"hand-written scores or weights were read by {func}")
                return arg._record.value()

        values = tree_map(value, args)
        out = func(*values, **tree_map(value, kwargs or {}))
        written = args and isinstance(args[0], Deferred) and out is values[0]
        return args[0] if written else out


_theirs: dict[Callable, Callable] = {}  # functions that stand in for torch's, and torch's


def stands_in_for(ours: Callable, theirs: Callable) -> None:
    """Tell that ``ours`` may be passed on as the function of torch that is called."""
    _theirs[ours] = theirs


def torchs_own(function: Callable) -> Callable:
    """Return the function of torch that ``function`` stands in for, or itself."""
    return _theirs.get(function, function)


# ---- making one -------------------------------------------------------------------------------------------------------------


def _without_memory(record: Record) -> Deferred:
    chain = record.chain
    strides, step = [], 1
    for size in reversed(chain.shape):
        strides.append(step)
        step *= size
    deferred = Tensor._make_wrapper_subclass(
        Deferred, chain.shape, strides=strides[::-1], dtype=chain.dtype, device=chain.query.device
    )
    torch._C._set_throw_on_mutable_data_ptr(deferred)  # for C++ code that reads memory without asking torch's dispatcher
    return deferred


def _new(record: Record) -> Deferred:
    if record.sources:
        deferred = in_graph(record, partial(_without_memory, record), *record.sources)
    else:
        deferred = _without_memory(record)
    deferred._record, deferred._views, deferred._node = record, [], _node(deferred) if record.sources else None
    return deferred


def _node(deferred: Deferred) -> object:
    with _as_torch_does():
        return deferred.grad_fn


def begin(function: Callable, args: tuple, kwargs: dict, count: Callable[[str | None], None]) -> Deferred | None:
    """Return the deferred product of queries and transposed keys if this call is one; ``count`` learns what comes of it."""
    function = torchs_own(function)
    operands = read(function, args, kwargs)
    chain = None if operands is None else scores_of(operands, count)
    if chain is None:
        return None
    args, kwargs = _kept(args), {name: _kept(arg) for name, arg in kwargs.items()}
    if len(args) == 2 and isinstance(args[1], tuple):  # of torch.einsum, which takes its operands one by one, too
        args = (args[0], *args[1])
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    if any(tensor.is_inference() for tensor in tensors):  # The chain must be one of their copies.
        chain = scores_of(read(function, args, kwargs), count)
    origin = Origin(count, Context.current(chain.query.device.type))
    return _new(Record(origin, None, function, args, kwargs, tensors, chain))


def uncounted(reason: str | None) -> None:
    """Count nothing, for a product that no report asks about."""


def _kept(arg: object) -> object:
    """Return what an argument is now: a copy of whatever may change without telling.

    These are lists, and tensors of inference mode, which have no version. Rounding may depend on strides, which are copied too.
    """
    if isinstance(arg, (tuple, list)):
        return tuple(map(_kept, arg))
    if not isinstance(arg, Tensor) or not arg.is_inference():
        return arg
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(arg.stride(), arg.shape))
    copy = torch.empty_like(arg) if overlaps else arg.new_empty_strided(arg.shape, arg.stride())
    return copy.copy_(arg)


# ---- calls ------------------------------------------------------------------------------------------------------------------


def _call(function: Callable, args: tuple, kwargs: dict) -> object:
    """Run a function of torch on arguments of which some are deferred."""
    if function in _ABOUT and args and not (args[0]._record.is_computed() and _is_ours(args[0])):
        with _as_torch_does():
            return function(*args, **kwargs)
    if function in _LIKE and len(args) > 1 and type(args[-1]) is Deferred:  # to(other), type_as(other)
        function, args = Tensor.to, (*args[:-1], args[-1].device, args[-1].dtype)
        if type(args[0]) is not Deferred:
            return function(*args, **kwargs)
    if function in _NEW and type(args[0]) is Deferred and not args[0]._record.is_computed():
        return function(torch.empty((), dtype=args[0].dtype, device=args[0].device), *args[1:], **kwargs)
    if function in _SHAPED and type(args[-1]) is Deferred:  # expand_as(other), of which only the shape counts
        return function(*args[:-1], torch.empty(args[-1].shape, device="meta"), **kwargs)
    step = STEPS.get(function)
    if step is not None or function in READERS:
        args = (*args[:1], *map(_if_computed, args[1:]))
        at = _place(args)
        if at is not None and _can_go_on(args[at]):
            out = _attended(function, args, kwargs, at) if step is None else _recorded(step, args, kwargs, at)
            if out is not None:
                return out
    return _by_torch(function, args, kwargs)


def _if_computed(arg: object) -> object:
    """Return the result of a deferred tensor that is computed already, and any other argument as it is."""
    known = type(arg) is Deferred and arg._record.is_computed() and torch.is_grad_enabled() and _is_ours(arg)
    return arg._record.result() if known else arg


def _place(args: tuple) -> int | None:
    """Return the position of the only deferred argument, or None if there are others or none."""
    place = None
    for at, arg in enumerate(args):
        if type(arg) is Deferred:
            if place is not None:
                return None
            place = at
    return place


def _can_go_on(deferred: Deferred) -> bool:
    """Tell whether a step may be recorded, and will then mean what it means now."""
    record = deferred._record
    if record.is_computed() or record.length >= _LONGEST or not record.origin.context.holds():
        return False
    return is_eager() and _is_ours(deferred)


def _is_ours(deferred: Deferred) -> bool:
    """Tell whether no function of autograd has written into the tensor, which has then become that function's."""
    return _node(deferred) is deferred._node


def _recorded(step: Step, args: tuple, kwargs: dict, at: int) -> Deferred | None:
    """Return the tensor after one more step, or None if it must be computed."""
    deferred, rest = args[at], _kept((*args[:at], *args[at + 1 :]))
    kwargs = {name: _kept(arg) for name, arg in kwargs.items()}
    before = deferred._record
    chain = before.chain
    writes = step.out_of_place is not None
    if writes and (at > 0 or any(other() is not None and other() is not deferred for other in deferred._views)):
        return None
    others = [arg for arg in (*rest, *kwargs.values()) if isinstance(arg, Tensor)]
    for other in others:
        if not is_ordinary(other) or (other.device != chain.query.device and other.dim()):
            return None
    try:
        after = step.describe(chain, at, *rest, **kwargs)
    except TypeError:  # arguments that none of ours has
        return None
    if after is SAME:
        return deferred
    if after is None:
        return None
    function = step.function
    if writes:
        if before.has_dependents():  # What was recorded of the tensor as it was must not see what is written.
            if after.dtype != chain.dtype:
                return None
            function = step.out_of_place
        after = after._replace(dtype=chain.dtype)
    record = Record(before.origin, before, function, rest, kwargs, others, after, at, step.is_view)
    if writes:
        return _rewritten(deferred, record)
    out = _new(record)
    if step.is_view:
        out._views = deferred._views = deferred._views or [weakref.ref(deferred)]
        out._views.append(weakref.ref(out))
    return out


def _rewritten(deferred: Deferred, record: Record) -> Deferred | None:
    """Make the tensor that of another record, or return None if C++ code holds it, for which that would be too late."""
    if record.sources and not _exchange(deferred, _new(record)):
        return None
    deferred._record = record
    return deferred


def _exchange(deferred: Deferred, other: Deferred) -> bool:
    """Exchange what autograd knows of two tensors, or return False if C++ code holds one of them."""
    try:
        torch._C._swap_tensor_impl(deferred, other)
    except RuntimeError:
        return False
    deferred._node = _node(deferred)
    return True


def _attended(function: Callable, args: tuple, kwargs: dict, at: int) -> Tensor | None:
    """Return the product of weights and values, or None if it must be computed by torch."""
    args, at = weights_first(function, args, at)
    deferred = args[at]
    with _as_torch_does():
        operands = read(function, args, kwargs)
    if operands is None or operands.left is not deferred or operands.added is not None or not is_ordinary(operands.right):
        return None
    record = deferred._record
    if operands.right.device != record.chain.query.device:
        return None
    with blocks.Outside():
        out, reason = record.attend(operands.right)
    record.origin.settle(reason)
    return out if operands.dims is None or out is None else out.permute(operands.dims)


# ---- everything else --------------------------------------------------------------------------------------------------------


class _Value(torch.autograd.Function):
    """Give a deferred tensor the place in the graph that its result has."""

    @staticmethod
    def forward(ctx, result: Tensor, record: Record) -> Deferred:
        return _without_memory(record)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


_at_value = direct_apply(_Value)


def _by_torch(function: Callable, args: tuple, kwargs: dict) -> object:
    """Run a function of torch on the results of deferred tensors."""
    results: list[tuple[Deferred, Tensor, object]] = []
    others = False
    writes = _writes(function, kwargs)

    def result(arg):
        nonlocal others
        if type(arg) is not Deferred:
            return arg
        if writes:
            arg._record.compute_dependents()
        if not _is_ours(arg):
            others = True
            return arg
        value = _computed(arg, function)
        results.append((arg, value, value.grad_fn))
        return value

    args, kwargs = tree_map(result, args), tree_map(result, kwargs)
    if others:
        with _as_torch_does():
            out = function(*args, **kwargs)
    else:
        out = function(*args, **kwargs)
    for deferred, value, grad_fn in results:
        _follow(deferred, value, grad_fn)
        if out is value:  # It was written in place.
            out = deferred
    return out


def _follow(deferred: Deferred, value: Tensor, grad_fn: object) -> None:
    """Give a deferred tensor its value's place in the graph, if that is another one since something was written in place."""
    with _as_torch_does():
        moved = value.grad_fn is not grad_fn or value.requires_grad != deferred.requires_grad
    if not moved or not torch.is_grad_enabled() or not is_eager():
        return
    if not _exchange(deferred, _at_value(value, deferred._record)):
        raise RuntimeError(f"hand-written scores were changed in place after C++ code had saved them; {ADVICE}")


def _writes(function: Callable, kwargs: dict) -> bool:
    """Tell whether a function may write into its arguments."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__set__", "__setitem__") or name.startswith("__i") or "out" in kwargs


def _computed(deferred: Deferred, function: object) -> Tensor:
    """Return what torch's calls give, because ``function`` needs it."""
    record = deferred._record
    if function in _OBSERVERS and record.met_values:
        raise RuntimeError(f"gradients of hand-written weights that have met their values are unknown to {function}; {ADVICE}")
    if not record.is_computed():
        named = getattr(function, "__self__", function) if getattr(function, "__name__", "") == "__get__" else function
        record.origin.settle(f"hand-written scores or weights were read by {getattr(named, '__name__', named)}")
        if record.sources and not torch.is_grad_enabled():  # perhaps in a function of autograd, which differentiates it later
            record.private()
        elif record.sources and is_eager():  # Code below Python, too, gets this very result from now on.
            _exchange(deferred, _at_value(record.result(), record))
    return record.result()


def _about() -> set[Callable]:
    """Return the functions that ask about a tensor, and need none of its values."""
    attributes = ("device", "dtype", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_nested", "is_quantized", "is_sparse")
    attributes += ("itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape")
    methods = ("__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point")
    methods += ("is_signed", "ndimension", "nelement", "numel", "size", "storage_offset", "stride")
    functions = {torch.is_complex, torch.is_floating_point, torch.numel}
    return functions | {getattr(Tensor, a).__get__ for a in attributes} | {getattr(Tensor, m) for m in methods}


_ABOUT = _about()
_OBSERVERS = {Tensor.register_hook, Tensor.retain_grad}
_LIKE = {Tensor.to, Tensor.type_as}
_SHAPED = {Tensor.expand_as, Tensor.reshape_as, Tensor.view_as}
_NEW = {Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros}
