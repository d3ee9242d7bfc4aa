"""What the torch ops share: when a call may pass the dispatcher by, and gradients that cannot be differentiated again."""

import functools

import torch
from torch import Tensor


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
