"""Run attention on GPUs: implement the torch ops of the Triton kernels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backend import triton as triton_kernels
from .call import TENSORS, AttentionCall, KVCacheCall, Tangents, kernel_options
from .checks import no_columns
from .op import (
    Passes,
    attention_op,
    check_cache_strides,
    empty_gradients,
    empty_results,
    empty_statistics,
    kvcache_op,
    output_gradients,
    rows_of,
    sink_gradient,
    sink_weights,
)
from .stats import (
    StatsGradients,
    StatsPasses,
    empty_key_mass,
    empty_row_stats,
    gradient_of_sink_weights,
    stats_op,
    subtracted_from_scores,
)

_MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(query: Tensor, value: Tensor) -> str | None:
    """Return why the Triton kernels cannot take a call, or None."""
    if reason := triton_kernels.why_not(query):
        return reason
    if query.dtype not in _DTYPES:
        return f"query has dtype {query.dtype}; float32, bfloat16 and float16 have kernels"
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > _MAX_HEAD_DIM:
        return f"a head_dim is {head_dim}; up to {_MAX_HEAD_DIM} have kernels"
    return no_columns(query, value)


def allow_tf32() -> bool:
    """Tell whether torch's own matrix products may round float32 to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Threads copy 16 bytes at once where rows start at multiples of 16 bytes. Where a head_dim makes them start elsewhere, kernels
# read copies with columns of zeros behind, which change no product, and write results of as many columns.


def _columns_missing(tensor: Tensor) -> int:
    """Return how many columns more would make the rows of a contiguous tensor start at multiples of 16 bytes."""
    return -tensor.shape[3] % (16 // tensor.element_size())


def _readable(tensor: Tensor) -> Tensor:
    """Return a tensor (batch, heads, rows, columns) as kernels read it."""
    missing = _columns_missing(tensor)
    return F.pad(tensor, (0, missing)) if missing else rows_of(tensor)


def _writable(result: Tensor) -> Tensor:
    """Return where kernels write a result: into the tensor itself, or into a wider one."""
    *outer, columns = result.shape
    missing = _columns_missing(result)
    return result.new_empty(*outer, columns + missing) if missing else result


def _fill(results: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Copy what kernels have written beside the results into them."""
    for result, wide in zip(results, written):
        if wide is not result:
            result.copy_(wide[..., : result.shape[3]])


def _kernel_call(call: AttentionCall):
    """Convert a call for the kernels' launchers: the same tensors, and the options by `kernel_options`."""
    kernels, tensors = triton_kernels.attention(), (*map(_readable, call[:3]), *call[3:TENSORS])
    return kernels.Call(*tensors, *kernel_options(call), allow_tf32(), kernels.architecture(call.query.device))


def score_unit(call: AttentionCall) -> float:
    """Return the factor from the kernels' scores to natural ones."""
    kernels = triton_kernels.attention()
    return call.scale if kernels.is_scale_only(kernels.Call(*call[:TENSORS], *kernel_options(call))) else 1.0


def _kernel_tangents(tangents: Tangents):
    """Convert tangents for the kernels' launchers."""
    rows = (None if tensor is None else _readable(tensor) for tensor in tangents[:3])
    return triton_kernels.attention().TangentTensors(*rows, *tangents[3:])


def forward(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, statistics)."""
    out, lse = empty_results(call.query, call.value)
    statistics, written, kernels = empty_statistics(call.query), _writable(out), triton_kernels.attention()
    with torch.cuda.device_of(call.query):
        kernels.run(kernels.plan_forward(_kernel_call(call), written, lse, statistics))
    _fill([out], [written])
    return out, lse, statistics


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    need_mask: bool,
    need_sinks: bool,
    call: AttentionCall,
    of_stats: StatsGradients | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, mask and sinks, from those of out, lse and any statistics."""
    kernels, kernel_call = triton_kernels.attention(), _kernel_call(call)
    *grads, grad_mask, grad_sinks = empty_gradients(call, need_mask, need_sinks)
    grad_out, grad_lse = output_gradients(out, grad_out, grad_lse)
    delta, statistics = torch.empty_like(lse, memory_format=torch.contiguous_format), statistics.contiguous()
    written = list(map(_writable, grads))
    wanted = *written, grad_mask if need_mask else None
    with torch.cuda.device_of(call.query):
        stats, grad_lse = _stats_grads(of_stats, grad_lse, lse, statistics, kernel_call)
        kernels.run(
            kernels.plan_backward(kernel_call, _readable(out), statistics, _readable(grad_out), grad_lse, wanted, delta, stats)
        )
    _fill(grads, written)
    if need_sinks:
        weights = sink_weights(call.sinks, statistics, score_unit(call), lse)
        by_weight = -delta if of_stats is None else gradient_of_sink_weights(delta, weights, of_stats)
        grad_sinks = sink_gradient(call.sinks, weights, by_weight)
    return *grads, grad_mask, grad_sinks


def _stats_grads(
    of_stats: StatsGradients | None, grad_lse: Tensor | None, lse: Tensor, statistics: Tensor, kernel_call
) -> tuple:
    """Return the statistics' gradients as kernels read them, and grad_lse less their part that is one number for a row.

    A score's gradient has them as p_ij (c_j - e_i log p_ij - (sum_k p_ik c_k + e_i entropy_i)), and delta as -p_ij delta_i,
    of which grad_lse is a negated part.
    """
    if of_stats is None or all(grad is None for grad in of_stats[:3]):
        return None, grad_lse
    kernels = triton_kernels.attention()
    entropy, max_logit, key_mass = (None if grad is None else grad.contiguous() for grad in of_stats[:3])
    mean_of_keys = None
    if key_mass is not None:
        mean_of_keys = torch.empty_like(lse, memory_format=torch.contiguous_format)
        kernels.run(kernels.plan_mass_mean(kernel_call, statistics, key_mass, mean_of_keys))
    grad_lse = subtracted_from_scores(grad_lse, mean_of_keys, of_stats)
    max_key = None if max_logit is None else of_stats.max_key.contiguous()
    return kernels.StatsGrads(entropy, max_logit, max_key, key_mass), grad_lse


def stats_forward(call: AttentionCall, want_rows: bool, want_mass: bool) -> tuple[Tensor, ...]:
    """Return (out, lse, statistics, entropy, max_logit, max_key, key_mass)."""
    out, lse = empty_results(call.query, call.value)
    statistics, written = empty_statistics(call.query), _writable(out)
    row_stats, key_mass = empty_row_stats(call, want_rows), empty_key_mass(call, want_mass)
    kernels, kernel_call = triton_kernels.attention(), _kernel_call(call)
    with torch.cuda.device_of(call.query):
        of_rows = kernels.RowStats(*row_stats) if want_rows else None
        launches = kernels.plan_forward(kernel_call, written, lse, statistics, of_rows)
        if want_mass:
            launches += kernels.plan_key_mass(kernel_call, statistics, key_mass)
        kernels.run(launches)
    _fill([out], [written])
    return out, lse, statistics, *row_stats, key_mass


def stats_backward(*args) -> tuple[Tensor, ...]:
    """Return what `backward` does; the gradients of the statistics come before the call."""
    *others, of_stats, call = args
    return backward(*others, call, of_stats)


def jvp(call: AttentionCall, tangents: Tangents) -> tuple[Tensor, ...]:
    """Return (out, lse, statistics, out_tangent, lse_tangent)."""
    (out, lse), (out_tangent, lse_tangent) = (empty_results(call.query, call.value) for _ in range(2))
    statistics, kernels = empty_statistics(call.query), triton_kernels.attention()
    written = _writable(out), _writable(out_tangent)
    results = kernels.JvpResults(written[0], lse, statistics, written[1], lse_tangent)
    with torch.cuda.device_of(call.query):
        kernels.run(kernels.plan_jvp(_kernel_call(call), _kernel_tangents(tangents), results))
    _fill((out, out_tangent), written)
    return out, lse, statistics, out_tangent, lse_tangent


def jvp_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    statistics: Tensor,
    out_tangent: Tensor,
    lse_tangent: Tensor,
    need_mask: bool,
    need_sinks: bool,
    call: AttentionCall,
    tangents: Tangents,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, mask and sinks, from those of the tangents of out and lse."""
    kernels, kernel_call = triton_kernels.attention(), _kernel_call(call)
    *grads, grad_mask, grad_sinks = empty_gradients(call, need_mask, need_sinks)
    grad_out, grad_lse = output_gradients(out, grad_out, grad_lse)
    lse_tangent = lse_tangent.contiguous()
    results = kernels.JvpResults(_readable(out), lse, statistics.contiguous(), _readable(out_tangent), lse_tangent)
    deltas, written = (torch.empty_like(lse_tangent), torch.empty_like(lse_tangent)), list(map(_writable, grads))
    wanted = *written, grad_mask if need_mask else None
    with torch.cuda.device_of(call.query):
        launches = kernels.plan_jvp_backward(
            kernel_call, _kernel_tangents(tangents), results, _readable(grad_out), grad_lse, wanted, deltas
        )
        kernels.run(launches)
    _fill(grads, written)
    if need_sinks:
        own = 0.0 if tangents.sinks is None else tangents.sinks.float()[:, None]
        by_weight = (lse_tangent - own) * deltas[0] - deltas[1]
        grad_sinks = sink_gradient(call.sinks, sink_weights(call.sinks, statistics, score_unit(call), lse), by_weight)
    return *grads, grad_mask, grad_sinks


def kvcache_forward(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """Append to the caches, and return (out, lse)."""
    check_cache_strides(call)
    out, lse = empty_results(call.query, call.value_cache)
    kernels = triton_kernels.attention()
    query, key, value = (None if t is None else rows_of(t) for t in (call.query, call.key, call.value))
    call = call._replace(query=query, key=key, value=value)
    kernel_call = kernels.KVCacheCall(*call, allow_tf32(), kernels.architecture(query.device))
    with torch.cuda.device_of(query):
        kernels.run(kernels.plan_kvcache(kernel_call, out, lse))
    return out, lse


attend, attend_watched = attention_op(
    "triton_attention", Passes(forward, stats_forward, backward, jvp, jvp_backward), ("CPU", "CUDA")
)
attend_with_stats = stats_op("triton_attention_stats", StatsPasses(stats_forward, stats_backward), ("CPU", "CUDA"))
kvcache_attend = kvcache_op("triton_kvcache_attention", kvcache_forward, ("CPU", "CUDA"))
