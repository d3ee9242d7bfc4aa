"""Give attention its derivatives: make of a backend's four passes what autograd and torch.func call.

With A(x) = (out, lse) for the inputs x, a cotangent g and a tangent t, the passes are

    forward   A(x),             backward      B(x, g) = grad_x <g, A(x)>,
    jvp       J(x, t) = dA(x) t,  jvp_backward  H(x, t, g) = grad_x <g, J(x, t)>.

As second derivatives commute, the four are closed up to the second order:

    <v, B(x, g)>    has the gradients J(x, v) for g, and H(x, v, g) for x;
    <u, J(x, t)>    has the gradients B(x, u) for t, and H(x, t, u) for x;
    <c, H(x, t, g)> has the gradient H(x, c, g) for t, as autograd.functional.hvp takes it;
    B(x, g)         has the tangent H(x, dx, g) + B(x, dg).

All else is of third order, or forward mode over forward mode, and raises. The memory is linear in the lengths. Each pass is an
autograd.Function here, whose results are None for what is not needed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..torch_op import (
    NO_MORE,
    innermost_is_jvp,
    may_bypass_dispatcher,
    save_for_both,
    seen_by_outer_levels,
    transforms_active,
    unknown_tangents,
    with_gradient,
    with_tangents,
)
from .call import DIFFERENTIABLE, TENSORS, AttentionCall

Tensors = Sequence[Tensor | None]

_FIELDS = len(AttentionCall._fields)
_NONE = (None,) * DIFFERENTIABLE


class Ops(NamedTuple):
    """Hold a backend's torch ops, and forward and backward as functions too, for calls that bypass the dispatcher."""

    run_forward: Callable
    run_watched: Callable  # the same with statistics: its first argument says whether it computes the keys' mass
    run_backward: Callable
    forward: Callable
    backward: Callable
    jvp: Callable
    jvp_backward: Callable


class Differentiable(NamedTuple):
    """Hold the differentiable functions of a call.

    Attributes:
        run_direct: returns (out, lse, statistics) of a call's fields, and bypasses the dispatcher.
        run_watched: two functions that do so, and return what the op of statistics does: without the keys' mass, and with it.
            Only out and lse have derivatives.
        run_dispatched: the same by the torch op, which torch.func's transforms and all other listeners have to see.
        run_dual: returns (out, lse), with their tangents, of a call in forward mode.
    """

    run_direct: Callable
    run_watched: tuple[Callable, Callable]
    run_dispatched: Callable
    run_dual: Callable


def differentiable(ops: Ops) -> Differentiable:
    """Return a backend's functions with all the derivatives that its ops allow."""
    passes = _passes(ops)

    def save(ctx, args: tuple, outputs: tuple) -> None:
        ctx.save_for_backward(*args[:TENSORS], *outputs[:3])
        ctx.options = args[TENSORS:]
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad_out: Tensor | None, grad_lse: Tensor | None, *_) -> tuple:
        *tensors, out, lse, statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad[:DIFFERENTIABLE]
        run = ops.backward
        if _differentiated_again():
            run = passes.backward
        elif may_bypass_dispatcher(grad_out, grad_lse, out, lse, statistics, *tensors):
            run = ops.run_backward
        grads = run(grad_out, grad_lse, out, lse, statistics, *needed[3:], *tensors, *ctx.options)
        return *_where(needed, grads), *(None,) * (_FIELDS - DIFFERENTIABLE)

    def save_with_tangents(ctx, args: tuple, outputs: tuple) -> None:
        # The statistics are not marked as not differentiable: of such an output jvp must return None, which vmap does not take.
        save_for_both(ctx, *args[:TENSORS], *outputs)
        ctx.options = args[TENSORS:]
        ctx.set_materialize_grads(False)

    def tangents(ctx, saved: Tensors, *given: Tensor | None) -> tuple:
        *_, out_tangent, lse_tangent = passes.jvp(*saved[:TENSORS], *ctx.options, *given[:DIFFERENTIABLE])
        return out_tangent, lse_tangent, torch.zeros_like(saved[-1])

    run_direct, run_dispatched = with_gradient(ops.run_forward, ops.forward, save, gradients, once=False)
    run_watched = tuple(
        with_gradient(partial(ops.run_watched, want_mass), ops.forward, save, gradients, once=False)[0]
        for want_mass in (False, True)
    )
    run_any_dual = with_tangents(ops.forward, save_with_tangents, gradients, tangents)

    def run_dual(call: AttentionCall) -> tuple[Tensor, Tensor]:
        # Forward mode over a backward needs the dual tensors to be saved, and under vmap tangents are not to be seen.
        if innermost_is_jvp() and (transforms_active() or not call.requires_grad()):
            pairs = [(None, None) if t is None else forward_ad.unpack_dual(t) for t in call[:DIFFERENTIABLE]]
            primals, given = zip(*pairs)
            if given != _NONE:
                out, lse, _, *of_both = passes.jvp(*primals, *call[DIFFERENTIABLE:], *given)
                return tuple(map(forward_ad.make_dual, (out, lse), of_both))
        return run_any_dual(*call)[:2]

    return Differentiable(run_direct, run_watched, run_dispatched, run_dual)


def _differentiated_again() -> bool:
    """Tell whether a backward may be differentiated itself: with create_graph, by torch.func, or in forward mode."""
    return (torch.is_grad_enabled() or forward_ad._current_level >= 0) and not torch.compiler.is_compiling()


def _where(needed: Sequence[bool], grads: Tensors) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needed))


def _sum(first: Tensors, second: Tensors) -> tuple[Tensor | None, ...]:
    """Add tensors by pairs, of which either may be missing."""
    return tuple(b if a is None else a if b is None else a + b for a, b in zip(first, second))


# ---- the passes as functions that are differentiated again ------------------------------------------------------------------
#
# Their arguments are those of the ops (op.py). Before the fields of the call come:
_OF_BACKWARD = 7  # grad_out, grad_lse, out, lse, statistics, need_mask, need_sinks
_OF_SECOND = 9  # grad_out, grad_lse, out, lse, statistics, out_tangent, lse_tangent, need_mask, need_sinks


class _Passes(NamedTuple):
    """Hold the passes by `apply` of a Function. The gradients that `jvp_backward` returns are None where not needed."""

    backward: Callable
    jvp: Callable
    jvp_backward: Callable


def _passes(ops: Ops) -> _Passes:
    class Backward(Function):
        """Compute B(x, g)."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return ops.backward(*args)

        @staticmethod
        def setup_context(ctx, args: tuple, outputs: tuple) -> None:
            save_for_both(ctx, *args[: _OF_BACKWARD - 2], *args[_OF_BACKWARD : _OF_BACKWARD + TENSORS])
            ctx.wanted = True, True, True, *args[_OF_BACKWARD - 2 : _OF_BACKWARD]
            ctx.options = args[_OF_BACKWARD + TENSORS :]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *directions: Tensor | None) -> tuple:
            (grad_out, grad_lse, *results), tensors = _split(ctx.saved_tensors, _OF_BACKWARD - 2)
            directions = _where(ctx.wanted, directions)
            needed = ctx.needs_input_grad[_OF_BACKWARD : _OF_BACKWARD + DIFFERENTIABLE]
            out_tangent = lse_tangent = None
            grads = _NONE
            if directions != _NONE:
                call = *tensors, *ctx.options
                *_, out_tangent, lse_tangent = passes.jvp(*call, *directions)
                saved = grad_out, grad_lse, *results, out_tangent, lse_tangent
                grads = _where(needed, passes.jvp_backward(*saved, *needed[3:], *call, *directions)) if any(needed) else _NONE
            of_cotangents = _where(ctx.needs_input_grad[:2], (out_tangent, lse_tangent))
            return *of_cotangents, *(None,) * (_OF_BACKWARD - 2), *grads, *(None,) * (_FIELDS - DIFFERENTIABLE)

        @staticmethod
        @seen_by_outer_levels
        def jvp(ctx, saved: Tensors, *given: Tensor | None) -> tuple:
            (grad_out, grad_lse, *results), tensors = _split(saved, _OF_BACKWARD - 2)
            call, flags, tangents = (*tensors, *ctx.options), ctx.wanted[3:], given[_OF_BACKWARD:][:DIFFERENTIABLE]
            of_results = _NONE
            if given[:2] != (None, None):
                of_results = passes.backward(*given[:2], *results, *flags, *call)
            if tangents != _NONE:
                *_, out_tangent, lse_tangent = passes.jvp(*call, *tangents)
                saved = grad_out, grad_lse, *results, out_tangent, lse_tangent
                of_results = _sum(of_results, passes.jvp_backward(*saved, *flags, *call, *tangents))
            return of_results

    class Jvp(Function):
        """Compute A(x) and J(x, t)."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return ops.jvp(*args)

        @staticmethod
        def setup_context(ctx, args: tuple, outputs: tuple) -> None:
            save_for_both(ctx, *args[:TENSORS], *args[_FIELDS:], *outputs)
            ctx.options = args[TENSORS:_FIELDS]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, grad_out, grad_lse, _, *of_tangents: Tensor | None) -> tuple:
            tensors, rest = _split(ctx.saved_tensors, TENSORS)
            tangents, results = _split(rest, DIFFERENTIABLE)
            call = *tensors, *ctx.options
            needed, by_tangents = ctx.needs_input_grad[:DIFFERENTIABLE], ctx.needs_input_grad[_FIELDS:]
            grads = of_directions = _NONE
            if (grad_out, grad_lse) != (None, None) and any(needed):
                grads = passes.backward(grad_out, grad_lse, *results[:3], *needed[3:], *call)
            if of_tangents != (None, None) and any(needed):
                grads = _sum(grads, passes.jvp_backward(*of_tangents, *results, *needed[3:], *call, *tangents))
            if of_tangents != (None, None) and any(by_tangents):
                of_directions = passes.backward(*of_tangents, *results[:3], *by_tangents[3:], *call)
            return *_where(needed, grads), *(None,) * (_FIELDS - DIFFERENTIABLE), *_where(by_tangents, of_directions)

        @staticmethod
        def jvp(ctx, *_):
            return unknown_tangents(ctx.saved_tensors[-5:])

    class JvpBackward(Function):
        """Compute H(x, t, g)."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return ops.jvp_backward(*args)

        @staticmethod
        def setup_context(ctx, args: tuple, outputs: tuple) -> None:
            save_for_both(ctx, *args[:5], *args[_OF_SECOND : _OF_SECOND + TENSORS], *outputs)
            ctx.wanted = True, True, True, *args[_OF_SECOND - 2 : _OF_SECOND]
            ctx.options = args[_OF_SECOND + TENSORS : _OF_SECOND + _FIELDS]
            ctx.tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *directions: Tensor | None) -> tuple:
            # The results (2 to 6) are functions of the others, whose gradients have their share.
            if any(i < 2 or _OF_SECOND <= i < _OF_SECOND + _FIELDS for i in _asked_for(ctx)):
                raise RuntimeError(NO_MORE)
            (grad_out, grad_lse, *results), tensors = _split(ctx.saved_tensors[:-DIFFERENTIABLE], 5)
            call, directions = (*tensors, *ctx.options), _where(ctx.wanted, directions)
            needed = ctx.needs_input_grad[_OF_SECOND + _FIELDS :]
            grads = _NONE
            if directions != _NONE and any(needed):
                *_, out_tangent, lse_tangent = passes.jvp(*call, *directions)
                saved = grad_out, grad_lse, *results, out_tangent, lse_tangent
                grads = _where(needed, passes.jvp_backward(*saved, *needed[3:], *call, *directions))
            return *(None,) * (_OF_SECOND + _FIELDS), *grads

        @staticmethod
        def jvp(ctx, *_):
            return unknown_tangents(ctx.saved_tensors[-DIFFERENTIABLE:])

    passes = _Passes(Backward.apply, Jvp.apply, lambda *args: JvpBackward.apply(*map(_above_leaf, args)))
    return passes


def _split(tensors: Tensors, at: int) -> tuple[Tensors, Tensors]:
    return tensors[:at], tensors[at:]


def _above_leaf(value: object) -> object:
    """Return a leaf as a view of it: autograd tells whether somebody asks for the gradient of anything but a leaf."""
    return value.view_as(value) if isinstance(value, Tensor) and value.requires_grad and value.is_leaf else value


def _asked_for(ctx) -> list[int]:
    """Return the places of a node's arguments whose gradients somebody asks for: autograd.grad may want a few of them alone."""
    if transforms_active():
        return [i for i, need in enumerate(ctx.needs_input_grad) if need]
    nodes = [node for node, _ in ctx.next_functions]
    return [i for i, node in zip(ctx.tensors, nodes) if node is not None and torch._C._will_engine_execute_node(node)]
