"""Run the forward and the backward of attention apart, by flash_attn's functions that ring attention and diffusers call.

A caller that attends to keys by parts joins their outputs by softmax_lse, and then asks for each part's share of the gradients
with the whole call's out and softmax_lse. So the backward takes the weights from softmax_lse here, which in float32 has no room
for the logarithm of the number of keys beside scores of millions; `flash_attn_func` knows no such limit.
"""

import torch
from torch import Tensor

from ...backend import UnsupportedError, select
from ...ops.attention.batched import batched_call, run
from ...ops.attention.call import DIFFERENTIABLE, AttentionCall
from ...ops.attention.parts import PASSES, statistics_of
from ...ops.attention.varlen import varlen_call
from ...ops.noise import seed_tensor
from ...ops.torch_op import reference_only
from .functions import gather_rows
from .options import check_call, explain_refusal, window_of

Forward = tuple[Tensor, Tensor, None, Tensor | None]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Forward:
    """Compute `flash_attn_func` of (B, S, H, D) tensors, without a gradient.

    Returns:
        (out, softmax_lse, S_dmask, rng_state): S_dmask is None, as `flash_attn_func` says; rng_state is the seed of the
        dropout, a 0-d int64 tensor, or None without dropout.
    """
    window = window_size_left, window_size_right
    call = _call(q, k, v, (), dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    out, lse, seed = _forward("attention", call)
    return out.transpose(1, 2), lse, None, seed


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> Forward:
    """Compute `flash_attn_varlen_func` of (total, H, D) tensors, without a gradient; return what `_flash_attn_forward` does.

    Raises:
        UnsupportedError: ``leftpad_k`` or ``seqused_k`` is given: packed keys have no gaps here.
    """
    for name, given in (("leftpad_k", leftpad_k), ("seqused_k", seqused_k)):
        if given is not None:
            raise UnsupportedError(f"{name} must be None: fastlm's packed keys have no gaps between sequences")
    if block_table is not None:
        k, v = gather_rows((k, v), block_table, cu_seqlens_k)
    offsets, window = (cu_seqlens_q, cu_seqlens_k), (window_size_left, window_size_right)
    call = _call(q, k, v, offsets, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    out, lse, seed = _forward("varlen_attention", call)
    return out[0].transpose(0, 1), lse[0], None, seed


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    """Write the gradients of q, k and v, (B, S, H, D), into dq, dk and dv, of which any may be None.

    ``out`` (B, Sq, H, D) and ``softmax_lse`` (B, H, Sq) are those of q with all keys that it attends to, of which k and v may
    be a part. flash_attn returns softmax_d, which only its own kernels read; None is returned here.
    """
    window = window_size_left, window_size_right
    call = _call(q, k, v, (), dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    grads = _gradients(call._replace(seed=rng_state), dout.transpose(1, 2), out.transpose(1, 2), softmax_lse)
    _write((dq, dk, dv), [grad.transpose(1, 2) for grad in grads])


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> None:
    """Do what `_flash_attn_backward` does for packed sequences: tensors (total, H, D), softmax_lse (H, total_q)."""
    offsets, window = (cu_seqlens_q, cu_seqlens_k), (window_size_left, window_size_right)
    call = _call(q, k, v, offsets, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    grads = _gradients(call._replace(seed=rng_state), _as_batch(dout), _as_batch(out), softmax_lse[None])
    _write((dq, dk, dv), [grad[0].transpose(0, 1) for grad in grads])


# ---- calls, and running them ------------------------------------------------------------------------------------------------


def _call(
    q, k, v, offsets: tuple[Tensor, ...], dropout_p, softmax_scale, causal, window, softcap, alibi_slopes
) -> AttentionCall:
    """Check the arguments of a batch, or of packed sequences if ``offsets`` are both cu_seqlens, and return the call."""
    check_call(q, alibi_slopes)
    softcap = softcap if softcap > 0.0 else None
    options = causal, window_of(window), softmax_scale, softcap, alibi_slopes, None, dropout_p
    try:
        if offsets:
            return varlen_call(q, k, v, *offsets, *options)
        return batched_call(*(tensor.transpose(1, 2) for tensor in (q, k, v)), None, *options)
    except (TypeError, ValueError):
        explain_refusal(q, k, v, **dict(zip(("cu_seqlens_q", "cu_seqlens_k"), offsets)))
        raise


def _as_batch(packed: Tensor) -> Tensor:
    """Return packed rows (total, H, D) as a batch of one: (1, H, total, D)."""
    return packed.transpose(0, 1).unsqueeze(0)


@torch.no_grad()
def _forward(op: str, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the output, the log-sum-exp, and the seed of the dropout, or None without dropout."""
    seed = seed_tensor(None, call.query) if call.dropout_p else None
    out, lse, _ = run(op, call, seed, None)
    return out, lse, seed


@torch.no_grad()
def _gradients(call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, from the output and the log-sum-exp over all keys."""
    passes = select("attention", PASSES, (call.query, call.value), None, reference_only(*call[:DIFFERENTIABLE]))
    statistics = statistics_of(lse, passes.unit(call))
    return passes.backward(grad_out, None, out, lse, statistics, False, False, call)[:3]


def _write(targets: tuple[Tensor | None, ...], grads: list[Tensor]) -> None:
    """Copy gradients into the tensors that the caller wants them in."""
    for target, grad in zip(targets, grads):
        if target is not None:
            target.copy_(grad)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
