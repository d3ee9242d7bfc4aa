"""Give attention its statistics: the record that calls return, and the torch ops that compute it with their gradients.

fastlm::attention_stats returns (out, lse, statistics) as fastlm::attention does, and (entropy, max_logit, max_key, key_mass).
max_key (B, Hq, Lq) is the key that has the largest logit, to which that one's gradient goes: the first of several, -1 where a
row sees none. What is not wanted is empty. fastlm::attention_stats_backward returns the gradients of query, key, value, mask
and sinks from those of out, lse and the statistics. The formulas are in reference/attention_stats.py. Derivatives of second
order, and forward mode, are the reference's.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference.attention_stats import attend_with_stats
from ..torch_op import define_op, leave_gradients_to_eager, may_bypass_dispatcher, with_gradient
from .call import DIFFERENTIABLE, INPUTS, TENSORS, AttentionCall
from .op import empty_gradients, empty_results, empty_statistics, vmap_rule


class AttentionStats(NamedTuple):
    """Hold statistics of attention's weights before dropout, float32 and differentiable; None where not asked for.

    Attributes:
        entropy: (B, Hq, Lq), in nats; a sink counts as one more key. 0 for a query that sees no key.
        max_logit: (B, Hq, Lq), the largest score after softcap, slopes and mask, without the sink. -inf for a query that sees
            no key. The gradient goes to the key that has it, the first of several.
        key_mass: (B, Hq, Lk), the sum over all queries of the weights that a key receives.

    Of packed sequences they are (Hq, total_q) twice, and (Hq, total_k).
    """

    entropy: Tensor | None
    max_logit: Tensor | None
    key_mass: Tensor | None


def check_return_stats(names: Iterable[str]) -> frozenset[str]:
    """Return the statistics that are asked for by name, as a set."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"return_stats must be a tuple of names such as ('entropy',); got {names!r}")
    wanted = frozenset(names)
    if unknown := [name for name in wanted if name not in AttentionStats._fields]:
        known = ", ".join(map(repr, AttentionStats._fields))
        raise ValueError(f"return_stats must hold names of {known}; got {unknown[0]!r}")
    return wanted


def stats_of(wanted: frozenset[str], entropy: Tensor, max_logit: Tensor, key_mass: Tensor) -> AttentionStats:
    """Return the record of what is wanted."""
    values = {"entropy": entropy, "max_logit": max_logit, "key_mass": key_mass}
    return AttentionStats(**{name: value if name in wanted else None for name, value in values.items()})


# What a backend's `attend_with_stats(call, want_rows, want_mass)` returns.
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # out, lse, entropy, max_logit, key_mass


def attend_on_reference(call: AttentionCall, want_rows: bool, want_mass: bool) -> Results:
    """Return (out, lse, entropy, max_logit, key_mass) in plain PyTorch. It computes all of them."""
    return attend_with_stats(*call)


# ---- a backend's ops --------------------------------------------------------------------------------------------------------


def empty_row_stats(call: AttentionCall, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Make the unwritten (entropy, max_logit, max_key) of a call, (B, Hq, Lq) each, or (B, Hq, 0) if not wanted."""
    query = call.query
    shape = (*query.shape[:2], query.shape[2] if wanted else 0)
    entropy, max_logit = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return entropy, max_logit, query.new_empty(shape, dtype=torch.int32)


def empty_key_mass(call: AttentionCall, wanted: bool) -> Tensor:
    """Make the unwritten key_mass (B, Hq, Lk) of a call, or (B, Hq, 0) if not wanted."""
    query = call.query
    return query.new_empty(*query.shape[:2], call.key.shape[2] if wanted else 0, dtype=torch.float32)


class StatsGradients(NamedTuple):
    """Hold the gradients of the statistics, and what their backward needs of them. A gradient of None counts as zeros."""

    grad_entropy: Tensor | None  # (B, Hq, Lq)
    grad_max_logit: Tensor | None  # (B, Hq, Lq)
    grad_key_mass: Tensor | None  # (B, Hq, Lk)
    entropy: Tensor  # (B, Hq, Lq), or (B, Hq, 0)
    max_key: Tensor  # (B, Hq, Lq), int32, or (B, Hq, 0)


def subtracted_from_scores(grad_lse: Tensor | None, mean_of_keys: Tensor | None, of_stats: StatsGradients) -> Tensor | None:
    """Return the gradient (B, Hq, Lq) that acts as one of lse: it, less what the statistics subtract from a row's gradients.

    ``mean_of_keys`` is the mean of grad_key_mass by a row's weights.
    """
    if mean_of_keys is not None:
        grad_lse = -mean_of_keys if grad_lse is None else grad_lse - mean_of_keys
    if of_stats.grad_entropy is not None:
        by_entropy = of_stats.grad_entropy * of_stats.entropy
        grad_lse = -by_entropy if grad_lse is None else grad_lse - by_entropy
    return grad_lse


def gradient_of_sink_weights(delta: Tensor, weights: Tensor, of_stats: StatsGradients) -> Tensor:
    """Return what the sinks' weights (B, Hq, Lq) are multiplied with in the gradient of the sinks."""
    if of_stats.grad_entropy is None:
        return -delta
    return -delta - of_stats.grad_entropy * torch.log(torch.where(weights == 0.0, 1.0, weights))


class StatsPasses(NamedTuple):
    """Hold a backend's functions of an AttentionCall.

    Attributes:
        forward: ``forward(call, want_rows, want_mass)`` returns (out, lse, statistics, entropy, max_logit, max_key, key_mass).
        backward: ``backward(grad_out, grad_lse, out, lse, statistics, need_mask, need_sinks, of_stats, call)``, with
            StatsGradients, returns the gradients of query, key, value, mask and sinks.
    """

    forward: Callable
    backward: Callable


_RESULTS = "Tensor out, Tensor lse, Tensor statistics, Tensor entropy, Tensor max_logit, Tensor max_key, Tensor key_mass"
_FLAGS = 2  # Before the call, the forward takes want_rows and want_mass.
_SAVED = 12  # Before the call, the backward takes grad_out ... statistics (5), StatsGradients, need_mask and need_sinks.


def stats_op(name: str, passes: StatsPasses, devices: tuple[str, ...]) -> Callable[[AttentionCall, bool, bool], Results]:
    """Make a backend's ``attend_with_stats(call, want_rows, want_mass)`` by its torch ops, with their gradients."""

    def run_forward(want_rows, want_mass, *call):
        return passes.forward(AttentionCall._make(call), want_rows, want_mass)

    def run_backward(*args):
        of_stats, flags = StatsGradients._make(args[5:10]), args[10:_SAVED]
        return passes.backward(*args[:5], *flags, of_stats, AttentionCall._make(args[_SAVED:]))

    def fake_forward(want_rows, want_mass, *fields):
        call = AttentionCall._make(fields)
        results = *empty_results(call.query, call.value), empty_statistics(call.query)
        return *results, *empty_row_stats(call, want_rows), empty_key_mass(call, want_mass)

    def fake_backward(*args):
        return empty_gradients(AttentionCall._make(args[_SAVED:]), *args[10:_SAVED])

    forward_op = define_op(
        name,
        f"(bool want_rows, bool want_mass, {INPUTS}) -> ({_RESULTS})",
        run_forward,
        fake_forward,
        devices,
        partial(vmap_rule, _FLAGS, 7, False),
    )
    backward_op = define_op(
        f"{name}_backward",
        "(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor statistics, Tensor? grad_entropy, "
        "Tensor? grad_max_logit, Tensor? grad_key_mass, Tensor entropy, Tensor max_key, bool need_mask, bool need_sinks, "
        f"{INPUTS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)",
        run_backward,
        fake_backward,
        devices,
        partial(vmap_rule, _SAVED, DIFFERENTIABLE, True),
        differentiated=False,
    )

    def save(ctx, args: tuple, outputs: tuple) -> None:
        out, lse, statistics, entropy, _, max_key, _ = outputs
        ctx.save_for_backward(*args[_FLAGS:][:TENSORS], out, lse, statistics, entropy, max_key)
        ctx.wanted, ctx.options = args[:_FLAGS], args[_FLAGS + TENSORS :]
        ctx.mark_non_differentiable(statistics, max_key)
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad_out, grad_lse, _, grad_entropy, grad_max_logit, __, grad_key_mass) -> tuple:
        *tensors, out, lse, statistics, entropy, max_key = ctx.saved_tensors
        needed, (want_rows, want_mass) = ctx.needs_input_grad[_FLAGS:][:DIFFERENTIABLE], ctx.wanted
        if not want_rows:  # torch.compile gives zeros where eager mode gives None, also to an empty tensor.
            grad_entropy = grad_max_logit = None
        if not want_mass:
            grad_key_mass = None
        saved = grad_out, grad_lse, out, lse, statistics, grad_entropy, grad_max_logit, grad_key_mass, entropy, max_key
        run = run_backward if may_bypass_dispatcher(*saved, *tensors) else backward_op
        grads = run(*saved, *needed[3:], *tensors, *ctx.options)
        wanted = (grad if need else None for grad, need in zip(grads, needed))
        return *(None,) * _FLAGS, *wanted, *(None,) * (len(AttentionCall._fields) - DIFFERENTIABLE)

    run_direct, run_dispatched = with_gradient(run_forward, forward_op, save, gradients)

    def attend(call: AttentionCall, want_rows: bool, want_mass: bool) -> Results:
        leave_gradients_to_eager()
        direct = may_bypass_dispatcher(*call[:TENSORS])
        if torch.is_grad_enabled() and call.requires_grad():
            run = run_direct if direct else run_dispatched
        else:
            run = run_forward if direct else forward_op
        out, lse, _, entropy, max_logit, _, key_mass = run(want_rows, want_mass, *call)
        return out, lse, entropy, max_logit, key_mass

    return attend
