"""The pair of torch ops behind attention: schema, CPU implementation, fake tensors, vmap and autograd.

fastlm::attention returns (out, lse) and fastlm::attention_backward the gradients of query, key, value, mask and sinks; one that
is not wanted is an empty tensor, as an op returns no None. Tensors are (batch, head, row, column); with cu_seqlens, sequences
lie one after the other along the rows of a batch of one.
"""

import math

import torch
from torch import Tensor

from .. import native
from ..native import empty, view
from ..reference.attention import drop_below
from .sums import sum_to
from .torch_op import differentiable_once, unobserved

# ---- the torch ops --------------------------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_OPTIONS = "SymInt? left, SymInt? right, float scale, float softcap, float dropout_p"
_library = torch.library.Library("fastlm", "FRAGMENT")
_library.define(f"attention({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_INPUTS}, bool need_mask, "
    f"bool need_sinks, {_OPTIONS}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_forward_op = torch.ops.fastlm.attention.default
_backward_op = torch.ops.fastlm.attention_backward.default
_TENSORS = 9  # the leading arguments of the forward

# ---- layout: results lie in memory as what they belong to --------------------------------------------------------------------


def _empty_like(tensor: Tensor, columns: int, make) -> Tensor:
    """(B, H, L, columns) by ``make(shape, dtype)``; in (B, L, H, columns) order where ``tensor`` is a transpose of that."""
    batch, heads, rows, _ = tensor.shape
    if heads > 1 and rows > 1 and tensor.stride(1) < tensor.stride(2):
        return make((batch, rows, heads, columns), tensor.dtype).transpose(1, 2)
    return make((batch, heads, rows, columns), tensor.dtype)


def empty_results(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, to be written."""
    batch, heads, rows, _ = query.shape
    return _empty_like(query, value_dim, empty), torch.empty(batch, heads, rows, dtype=torch.float32)


def attention_fake(query, key, value, *rest):
    out = _empty_like(query, value.shape[3], lambda shape, dtype: query.new_empty(shape, dtype=dtype))
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward_fake(grad_out, grad_lse, out, lse, query, key, value, mask, sinks, *rest):
    need_mask, need_sinks = rest[4:6]

    def like(tensor):
        return _empty_like(tensor, tensor.shape[3], lambda shape, dtype: tensor.new_empty(shape, dtype=dtype))

    grad_mask = mask.new_empty(mask.shape) if need_mask else query.new_empty(0)
    grad_sinks = sinks.new_empty(sinks.shape) if need_sinks else query.new_empty(0)
    return like(query), like(key), like(value), grad_mask, grad_sinks


# ---- what the C++ code is told ----------------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] <= 1 else tensor.contiguous()


def _mask_rows(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Expanded to (B, Hq, Lq, Lk) by strides of 0."""
    if mask.dtype == torch.float64:
        mask = mask.float()
    if mask.dim() and mask.shape[-1] > 1 and mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask.expand(*query.shape[:3], key.shape[2])


def arranged(query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k) -> tuple:
    """The tensors as the C++ code reads them, in its order."""
    return (
        view(rows_of(query)),
        view(rows_of(key)),
        view(rows_of(value)),
        None if mask is None else view(_mask_rows(mask, query, key)),
        None if alibi_slopes is None else view(alibi_slopes.float().contiguous()),
        None if sinks is None else view(sinks.float().contiguous()),
        None if seed is None else view(seed.contiguous()),
        None if cu_seqlens_q is None else view(cu_seqlens_q.contiguous()),
        None if cu_seqlens_k is None else view(cu_seqlens_k.contiguous()),
    )


def numbers(left, right, scale, softcap, dropout_p) -> tuple:
    """The options as the C++ code reads them."""
    if dropout_p:
        return left, right, scale, softcap, drop_below(dropout_p), 1.0 / (1.0 - dropout_p)
    return left, right, scale, softcap, 0, 1.0


# ---- the CPU ----------------------------------------------------------------------------------------------------------------


def _forward_cpu(query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, *options):
    out, lse = empty_results(query, value.shape[3])
    inputs = arranged(query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k)
    native.C.attention_forward(inputs, numbers(*options), view(out), view(lse), torch.get_num_threads())
    return out, lse


# Queries that share a row of the mask's gradient where the mask is one for all: kBlockRows of csrc/cpu/attention.h.
_MASK_BLOCK = native.C.attention_block_rows if native.C else 1


def _mask_gradient_buffer(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """float32 zeros over the mask's batch and head, rows (blocks of queries where it is one for all), and all keys."""
    batch, heads, rows, _ = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if rows == 1:
        rows = -(-query.shape[2] // _MASK_BLOCK)
    return torch.zeros(batch, heads, rows, key.shape[2])


def _backward_cpu(grad_out, grad_lse, out, lse, query, key, value, mask, sinks, *rest):
    need_mask, need_sinks, options = *rest[4:6], rest[6:]
    grads = tuple(_empty_like(t, t.shape[3], empty) for t in (query, key, value))
    grad_mask = _mask_gradient_buffer(mask, query, key) if need_mask else None
    expanded = None
    if need_mask:
        expanded = grad_mask.expand(query.shape[0], query.shape[1], *grad_mask.shape[2:])
    grad_out = torch.zeros_like(out) if grad_out is None else rows_of(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    native.C.attention_backward(
        arranged(query, key, value, mask, sinks, *rest[:4]),
        numbers(*options),
        tuple(map(view, (out, grad_out, lse, grad_lse, delta))),
        (*map(view, grads), view(expanded)),
        need_mask and (mask.dim() < 2 or mask.shape[-2] == 1),
        torch.get_num_threads(),
    )
    grad_mask = sum_to(grad_mask, mask) if need_mask else query.new_empty(0)
    return *grads, grad_mask, _sink_gradient(sinks, lse, delta) if need_sinks else query.new_empty(0)


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink has no value, so its score's gradient is p (0 - delta), with p its share of the softmax."""
    share = torch.exp(sinks.float()[:, None] - lse.masked_fill(lse == -math.inf, math.inf))
    return sum_to(-share * delta, sinks[:, None]).reshape(sinks.shape)


_library.impl("attention", _forward_cpu, "CPU")
_library.impl("attention_backward", _backward_cpu, "CPU")
torch.library.register_fake("fastlm::attention", attention_fake, lib=_library)
torch.library.register_fake("fastlm::attention_backward", _backward_fake, lib=_library)

# ---- vmap: entries become one batch where the op has a place for that, and calls of their own elsewhere ---------------------


def _is_one_batch(in_dims: tuple, inputs: tuple, wanted: tuple = ()) -> bool:
    """Whether vmapped calls can be one: dropout counts heads by their batch, and masks, slopes and sinks may not go along."""
    mask, _, slopes, seed, cu_seqlens_q, _ = inputs[3:]
    shared = mask is None or mask.dim() < 4 or mask.shape[0] == 1
    shared &= slopes is None or slopes.dim() == 1
    return shared and seed is None and cu_seqlens_q is None and in_dims[3:] == (None,) * 6 and not any(wanted)


def _folded(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(entries * batch, ...)."""
    if tensor is None:
        return None
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _one_by_one(op, size: int, in_dims: tuple, args: tuple) -> tuple:
    """The stacked results of a call for each entry."""
    calls = (op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims))) for i in range(size))
    return tuple(map(torch.stack, zip(*calls)))


def _forward_vmap(info, in_dims, *args):
    size, inputs = info.batch_size, args[:_TENSORS]
    if not _is_one_batch(in_dims[:_TENSORS], inputs):
        return _one_by_one(_forward_op, size, in_dims, args), (0, 0)
    folded = (_folded(t, d, size) for t, d in zip(inputs[:3], in_dims))
    results = _forward_op(*folded, *args[3:])
    return tuple(result.unflatten(0, (size, -1)) for result in results), (0, 0)


def _backward_vmap(info, in_dims, *args):
    size, first = info.batch_size, 4  # after grad_out, grad_lse, out and lse
    inputs, wanted = args[first : first + _TENSORS], args[first + _TENSORS : first + _TENSORS + 2]
    if not _is_one_batch(in_dims[first : first + _TENSORS], inputs, wanted):
        return _one_by_one(_backward_op, size, in_dims, args), (0,) * 5
    folded = (_folded(t, d, size) for t, d in zip(args[: first + 3], in_dims))
    *grads, grad_mask, grad_sinks = _backward_op(*folded, *args[first + 3 :])
    return (*(grad.unflatten(0, (size, -1)) for grad in grads), grad_mask, grad_sinks), (0, 0, 0, None, None)


torch.library.register_vmap("fastlm::attention", _forward_vmap, lib=_library)
torch.library.register_vmap("fastlm::attention_backward", _backward_vmap, lib=_library)

# ---- autograd -------------------------------------------------------------------------------------------------------------

_SMALL = 1 << 18  # elements of a query up to which a call is all overhead, or might be
_DIFFERENTIABLE = 5  # query, key, value, mask, sinks: the first of the tensors


def _forward(query, key, value, *rest):
    return (_forward_cpu if unobserved(query, key, value) else _forward_op)(query, key, value, *rest)


def _save(ctx, args, outputs) -> None:
    ctx.save_for_backward(*args[:_TENSORS], *outputs)
    ctx.options = args[_TENSORS:]
    ctx.set_materialize_grads(False)


@differentiable_once
def _gradients(ctx, grad_out, grad_lse) -> tuple:
    *tensors, out, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    grads = _backward_op(grad_out, grad_lse, out, lse, *tensors, *needed[3:], *ctx.options)
    unused = (None,) * (_TENSORS - _DIFFERENTIABLE + len(ctx.options))
    return *(grad if need else None for grad, need in zip(grads, needed)), *unused


class _Attention(torch.autograd.Function):
    """The op with its gradient. A forward that takes ctx costs the least per call."""

    @staticmethod
    def forward(ctx, *args):
        outputs = _forward(*args)
        _save(ctx, args, outputs)
        return outputs

    backward = staticmethod(_gradients)


class _AttentionForFunctorch(torch.autograd.Function):
    """The same for torch.func's transforms, which ask for the two halves of forward apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _forward_op(*args)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)


def attend(
    query, key, value, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap, dropout_p
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the op, with gradients where an input asks for them."""
    args = (query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k)
    args += (left, right, scale, softcap, dropout_p)
    if torch.is_grad_enabled() and _any_requires_grad(*args[:_DIFFERENTIABLE]):
        under_functorch = torch._C._are_functorch_transforms_active()
        return (_AttentionForFunctorch if under_functorch else _Attention).apply(*args)
    return _forward(*args)


def attend_plainly(query, key, value, scale, causal, top_left, grouped) -> Tensor | None:
    """The output of a small call that has no options and needs no gradient, at the least cost; None where it is not that."""
    if native.C is None or not unobserved(query, key, value) or query.numel() > _SMALL or torch.is_autocast_enabled("cpu"):
        return None
    if torch.is_grad_enabled() and _any_requires_grad(query, key, value, None, None):
        return None
    out = torch.empty_like(query)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    threads = torch.get_num_threads()
    return out if native.C.attention_plain(query, key, value, out, scale, causal, top_left, grouped, threads) else None


def _any_requires_grad(query, key, value, mask, sinks) -> bool:
    required = query.requires_grad or key.requires_grad or value.requires_grad
    return required or (mask is not None and mask.requires_grad) or (sinks is not None and sinks.requires_grad)
