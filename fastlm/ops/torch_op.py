"""Register torch ops, decide when a call may bypass the dispatcher, and add gradients that cannot be differentiated again."""

import functools
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ..backend import cpu as native
from ..backend.cpu import constant_when_compiled

_library = torch.library.Library("fastlm", "FRAGMENT")
_defined: set[str] = set()


def define_op(
    name: str,
    signature: str,
    run: Callable,
    fake: Callable,
    devices: tuple[str, ...] = ("CPU",),
    vmap: Callable | None = None,
    differentiated: bool = True,
):
    """Register fastlm::<name>, which calls ``run`` on those devices, and return it.

    If another backend has registered the op, only the devices are added. A ``vmap`` rule gets the op as its first argument.
    ``differentiated`` says that an autograd.Function calls the op wherever it has a gradient; another op raises there, where
    torch would warn and give zeros, as in a derivative of second order that is compiled.
    """
    qualified, is_new = f"fastlm::{name}", name not in _defined
    if is_new:
        _defined.add(name)
        _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, fake, lib=_library)
    for device in devices:
        _library.impl(name, run, device)
    op = getattr(torch.ops.fastlm, name).default
    if is_new and not differentiated:
        _library.impl(name, functools.partial(_without_gradient, op), "Autograd")
    if is_new and vmap is not None:
        torch.library.register_vmap(qualified, functools.partial(vmap, op), lib=_library)
    return op


def _without_gradient(op, *args):
    """Run an op below autograd, or refuse where a gradient would be missing."""
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        raise RuntimeError(f"{NO_MORE}; derivatives of second order cannot be compiled")
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def batch_first(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Return a vmapped tensor as (entries, ...); one that is not vmapped (``dim`` is None) is expanded to ``size`` entries."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


# ---- which calls may bypass torch's dispatcher on the way to a kernel, and which must not reach a kernel at all -------------


def _keys(*names: str) -> torch._C.DispatchKeySet:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


# The dispatch keys of a tensor that nothing listens to: an ordinary one, and one of inference mode.
_PLAIN_TENSOR = tuple(
    keys
    for device in ("CPU", "CUDA")
    for keys in (_keys(device, "ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"), _keys(device, f"Autocast{device}"))
)

# Every call asks these. Each name saves the steps of an attribute look-up, which a small call feels.
_is_compiling = torch.compiler.is_compiling
_profiler_enabled = torch.autograd._profiler_enabled
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_tensor_keys = torch._C._dispatch_keys


def is_eager() -> bool:
    """Tell whether torch runs what is called: nothing traces, transforms, replaces or forward-differentiates its ops."""
    if _is_compiling() or forward_ad._current_level >= 0 or _tracing_state() is not None:
        return False
    return not _dispatch_modes() and not transforms_active()


def is_ordinary(value: object) -> bool:
    """Tell whether this is a dense tensor that nothing listens to, by its exact type and dispatch keys."""
    kind = type(value)
    return (kind is Tensor or kind is Parameter) and _tensor_keys(value) in _PLAIN_TENSOR


def may_bypass_dispatcher(*tensors: Tensor | None) -> bool:
    """Tell whether a call may save torch's dispatcher (8 us): nothing watches, replaces or forward-differentiates its ops.

    This is a whitelist over every tensor of the call. Exact types and dispatch keys say what a tensor is (dense, not negated,
    not a ZeroTensor, no wrapper). Anything not known to be plain goes through the op, and so does everything while a
    forward-mode level, profiler, mode, transform or tracer is on. (One comparison of the thread's own dispatch keys would say
    the last three, and takes twice the time.)
    """
    if not is_eager() or _profiler_enabled() or _function_modes():
        return False
    for tensor in tensors:
        if tensor is not None:  # `is_ordinary`, without the time of a call
            kind = type(tensor)
            if (kind is not Tensor and kind is not Parameter) or _tensor_keys(tensor) not in _PLAIN_TENSOR:
                return False
    return True


# torch.compile and torch.export show any tensor as one of the last two. Every other class may give ops another meaning, as
# DTensor does, or keep its values elsewhere. NoneType is the class of an optional tensor that was not given.
PLAIN = frozenset((type(None), Tensor, Parameter, FakeTensor, FunctionalTensor))


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Tell whether no class of ``tensors`` gives torch's ops a meaning of its own."""
    return PLAIN.issuperset(map(type, tensors))


EXPORTS = "ONNX knows torch's own ops alone"


@constant_when_compiled
def _exports_to_onnx() -> bool:
    onnx = sys.modules.get("torch.onnx")  # Any exporter has imported it.
    return onnx is not None and onnx.is_in_onnx_export()


NO_TANGENTS = "the kernels have no forward-mode derivatives"


def export_only() -> str | None:
    """Return why only the reference, which consists of torch's own ops, can run a call that is exported, or None."""
    builds_graph = _is_compiling() or _tracing_state() is not None
    return EXPORTS if builds_graph and _exports_to_onnx() else None


def may_have_tangents(*tensors: Tensor | None) -> bool:
    """Tell whether one of the tensors has a tangent, or may have one inside the wrapper of a transform of torch.func."""
    if forward_ad._current_level < 0:
        return False
    return transforms_active() or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def has_tangent(tensor: Tensor) -> bool:
    """Tell whether a tensor has a tangent that can be seen: under vmap, one outside of it cannot."""
    if forward_ad._current_level < 0 or not innermost_is_jvp():
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def reference_only(*tensors: Tensor | None) -> str | None:
    """Return why only the reference can run a call with these tensors, if the kernels have no forward mode, or None."""
    return export_only() if forward_ad._current_level < 0 else NO_TANGENTS if may_have_tangents(*tensors) else None


# ---- gradients --------------------------------------------------------------------------------------------------------------


NO_MORE = (
    'fastlm\'s kernels have no derivatives of this order; backend="reference" has them, and so has torch, outside of '
    "fastlm.use or with its handwritten=False"
)


def unknown_tangents(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return the tangents of outputs whose derivatives there are not: torch.func asks for them, so that they raise.

    A dual level of forward_ad computes tangents of all that happens inside, as of a gradient that itself is of second order;
    nobody need read them, so that they are NaN.
    """
    if transforms_active():
        raise RuntimeError(NO_MORE)
    return tuple(torch.full_like(output, torch.nan) for output in outputs)


class _Final(torch.autograd.Function):
    """Return the first ``count`` of the tensors as functions of the others, whose derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx, args, outputs):
        ctx.save_for_forward(*outputs)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(NO_MORE)

    @staticmethod
    def jvp(ctx, *_):
        return unknown_tangents(ctx.saved_tensors)


def differentiable_once(backward):
    """Decorate an autograd.Function's backward whose kernels have no gradient themselves.

    Without it, a second derivative would silently lack the part through the kernels. torch's own once_differentiable does not
    prevent that: it looks only at the incoming gradients, not at the saved tensors, and marks nothing under torch.func.
    """

    @functools.wraps(backward)
    def once(ctx, *grad_outputs):
        if _is_compiling() or not (torch.is_grad_enabled() or forward_ad._current_level >= 0):
            return backward(ctx, *grad_outputs)
        with torch.no_grad():
            grads = backward(ctx, *grad_outputs)
        given = [grad for grad in grads if grad is not None]
        forward_mode = forward_ad._current_level >= 0
        tensors = [t for t in (*grad_outputs, *ctx.saved_tensors) if t is not None]
        marked = iter(_Final.apply(len(given), *given, *(t for t in tensors if forward_mode or t.requires_grad)))
        return tuple(None if grad is None else next(marked) for grad in grads)

    return once


def seen_by_outer_levels(jvp):
    """Decorate an autograd.Function's ``jvp(ctx, saved, *tangents)``, so that torch.func's outer levels see what it calls.

    torch switches forward mode off in there, and in forward mode over forward mode the outer tangents would silently be zeros.
    ``saved`` are the saved tensors, in that case without the tangents of this level.
    """

    @functools.wraps(jvp)
    def seen(ctx, *tangents):
        saved = ctx.saved_tensors
        if _jvp_levels() < 2:
            return jvp(ctx, saved, *tangents)
        if not innermost_is_jvp():
            raise RuntimeError("fastlm has no forward mode over forward mode of a vmap")
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in saved]
            return jvp(ctx, saved, *tangents)

    return seen


_JVP = torch._C._functorch.TransformType.Jvp


def _jvp_levels() -> int:
    """Return how many transforms of torch.func that surround a call are jvps."""
    return sum(level.key() == _JVP for level in torch._C._functorch.get_interpreter_stack() or ())


@constant_when_compiled
def _in_grad_transform() -> bool:
    grad = torch._C._functorch.TransformType.Grad
    return any(level.key() == grad for level in torch._C._functorch.get_interpreter_stack() or ())


def leave_gradients_to_eager() -> None:
    """Let a torch.func.grad that torch.compile traces be run in eager mode, as dynamo does with what raises.

    Its tensors do not say that they require gradients, and dynamo would leave out any autograd.Function: zeros.
    """
    if _is_compiling() and _in_grad_transform():
        raise NotImplementedError("torch.compile cannot trace a torch.func.grad of fastlm's ops")


def innermost_is_jvp() -> bool:
    """Tell whether the innermost transform of torch.func, if there are any, is a jvp, which shows tangents."""
    innermost = torch._C._functorch.peek_interpreter_stack()
    return innermost is None or innermost.key() == _JVP


def direct_apply(function: type[torch.autograd.Function]) -> Callable:
    """Return the ``apply`` of a function for calls that bypass the dispatcher.

    Function.apply first looks for torch.func's transforms and for what they left in the arguments. Such a call has none of
    that, and saves 4 us.
    """
    return super(torch.autograd.Function, function).apply


def with_gradient(
    kernel: Callable, op: Callable, save: Callable, backward: Callable, once: bool = True
) -> tuple[Callable, Callable]:
    """Give a forward its gradient: ``save(ctx, args, outputs)`` keeps what ``backward(ctx, *grad_outputs)`` needs.

    ``once`` says that the backward cannot be differentiated itself.

    Return two functions of the same arguments. The first runs the ``kernel`` and bypasses the dispatcher. The second runs the
    ``op``, which torch.func's transforms and all other listeners have to see.
    """

    class Direct(torch.autograd.Function):
        """Run the kernel. A forward that takes ctx costs the least per call."""

        @staticmethod
        def forward(ctx, *args):
            outputs = kernel(*args)
            save(ctx, args, outputs)
            return outputs

    Direct.backward = staticmethod(differentiable_once(backward) if once else backward)
    return direct_apply(Direct), _dispatched(op, save, Direct.backward).apply


def with_tangents(op: Callable, save: Callable, backward: Callable, jvp: Callable) -> Callable:
    """Return an op with its gradient and its tangents: ``jvp(ctx, saved, *tangents)`` returns those of the outputs.

    ``save`` keeps tensors by `save_for_both`. torch.compile takes no Function that has a jvp.
    """
    dual = _dispatched(op, save, backward)
    dual.jvp = staticmethod(seen_by_outer_levels(jvp))
    return dual.apply


def _dispatched(op: Callable, save: Callable, differentiate: Callable) -> type[torch.autograd.Function]:
    """Make a Function that runs an op. torch.func requires forward and setup_context apart."""

    class Dispatched(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)

        @staticmethod
        def forward(*args):
            return op(*args)

    return Dispatched


def save_for_both(ctx, *tensors: Tensor | None) -> None:
    """Save tensors for the backward and for the jvp. Under vmap both have to have the same."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


# ---- sums for the gradients of broadcast tensors -----------------------------------------------------------------------------


def sum_to(gradient: Tensor, target: Tensor) -> Tensor:
    """Sum over the dimensions that ``target`` was broadcast along, in an order that does not depend on the number of threads.

    torch's order on a CPU does depend on it; on a GPU torch's order is fixed, and torch sums. ``gradient`` is float32 or
    float64, and may be longer than ``target`` where ``target`` has size 1. Return a tensor of target's shape and dtype.
    """
    if gradient.shape == target.shape:
        return gradient.to(target.dtype)
    shape = (1,) * (gradient.dim() - target.dim()) + tuple(target.shape)
    summed = [d for d, (g, t) in enumerate(zip(gradient.shape, shape)) if t == 1 and g != 1]
    kept = [d for d in range(gradient.dim()) if d not in summed]
    if gradient.numel() == 0:
        return target.new_zeros(target.shape)
    if not summed:
        return gradient.reshape(target.shape).to(target.dtype)
    if native.C is None or not gradient.is_cpu:
        return gradient.sum(summed, keepdim=True).reshape(target.shape).to(target.dtype)
    rows = gradient.permute(*summed, *kept).reshape(-1, target.numel()).contiguous()
    total = gradient.new_empty(target.numel())
    native.C.sum_rows(native.view(rows), native.view(total))
    return total.reshape(target.shape).to(target.dtype)
