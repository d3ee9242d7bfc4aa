"""What the torch ops share: how one is registered, when a call may pass the dispatcher by, and gradients, which cannot be
differentiated again."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("fastlm", "FRAGMENT")


def define_op(
    name: str, signature: str, run: Callable, fake: Callable, devices: tuple[str, ...] = ("CPU",), vmap: Callable | None = None
):
    """Register fastlm::<name>, which calls ``run`` on those devices, and return it. A ``vmap`` rule is given the op as well."""
    qualified = f"fastlm::{name}"
    _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    for device in devices:
        _library.impl(name, run, device)
    torch.library.register_fake(qualified, fake, lib=_library)
    op = getattr(torch.ops.fastlm, name).default
    if vmap is not None:
        torch.library.register_vmap(qualified, functools.partial(vmap, op), lib=_library)
    return op


def unobserved(*tensors: Tensor) -> bool:
    """Whether nothing watches or replaces calls of ops, so that the way through torch's dispatcher, 8 us, can be saved."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled():
        return False
    for tensor in tensors:
        if (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter) or tensor.is_neg():
            return False  # a subclass that wants to be asked; a view that negates
    return not torch._C._are_functorch_transforms_active()


class _Final(torch.autograd.Function):
    """The first ``count`` of the tensors, which depend on the others; their derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx, args, outputs):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError('fastlm\'s kernels have first derivatives alone; backend="reference" has the second ones')


def differentiable_once(backward):
    """A decorator for an autograd.Function's backward by kernels that have no gradient themselves.

    Without it a second derivative would silently lack what goes through them. torch's own once_differentiable looks at the
    gradients that come in alone, not at the saved tensors, and so lets that happen; and it marks nothing under torch.func.
    """

    @functools.wraps(backward)
    def once(ctx, *grad_outputs):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grad_outputs)
        with torch.no_grad():
            grads = backward(ctx, *grad_outputs)
        given = [grad for grad in grads if grad is not None]
        causes = [t for t in (*grad_outputs, *ctx.saved_tensors) if t is not None and t.requires_grad]
        final = iter(_Final.apply(len(given), *given, *causes))
        return tuple(None if grad is None else next(final) for grad in grads)

    return once


def with_gradient(forward: Callable, op: Callable, save: Callable, backward: Callable) -> Callable:
    """``forward(*args)`` with a gradient: ``save(ctx, args, outputs)`` keeps what ``backward(ctx, *grad_outputs)`` needs.

    ``forward`` may pass the dispatcher by; under torch.func's transforms, which have to see it, the ``op`` itself is called.
    """

    class Direct(torch.autograd.Function):
        """A forward that takes ctx costs the least per call."""

        @staticmethod
        def forward(ctx, *args):
            outputs = forward(*args)
            save(ctx, args, outputs)
            return outputs

    class ForFunctorch(torch.autograd.Function):
        """torch.func asks for the two halves of forward apart."""

        generate_vmap_rule = True
        setup_context = staticmethod(save)

        @staticmethod
        def forward(*args):
            return op(*args)

    Direct.backward = ForFunctorch.backward = staticmethod(differentiable_once(backward))

    def apply(*args):
        return (ForFunctorch if torch._C._are_functorch_transforms_active() else Direct).apply(*args)

    return apply
