"""The pair of torch ops behind attention: schema, CPU implementation, fake tensors, vmap and autograd.

fastlm::attention returns (out, lse) and fastlm::attention_backward the gradients of query, key, value, mask and sinks; one that
is not wanted is an empty tensor, as an op returns no None. Tensors are (batch, head, row, column); with cu_seqlens, sequences
lie one after the other along the rows of a batch of one.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import native
from ..native import empty, view
from ..reference.attention import drop_below
from .sums import sum_to

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
    return _empty_like(query, value_dim, empty), torch.empty(query.shape[:3], dtype=torch.float32)


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


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _mask_rows(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Expanded to (B, Hq, Lq, Lk) by strides of 0."""
    if mask is None:
        return None
    if mask.dtype == torch.float64:
        mask = mask.float()
    if mask.dim() and mask.shape[-1] > 1 and mask.stride(-1) != 1:
        mask = mask.contiguous()
    return mask.expand(*query.shape[:3], key.shape[2])


class Call:
    """A call as the C++ code takes it. It keeps alive what has its address taken."""

    def __init__(self, query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, *options):
        left, right, scale, softcap, dropout_p = options
        self.query, self.key, self.value = rows_of(query), rows_of(key), rows_of(value)
        self.mask = _mask_rows(mask, query, key)
        self.sinks = None if sinks is None else sinks.float().contiguous()
        self.slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
        self.seed = None if seed is None else seed.contiguous()
        self.offsets = (None, None) if cu_seqlens_q is None else (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
        batch, heads, q_len, head_dim = query.shape
        if cu_seqlens_q is not None:
            batch = cu_seqlens_q.shape[0] - 1
        self.sizes = (batch, heads, key.shape[1], q_len, key.shape[2], head_dim, value.shape[3])
        self.inputs = (
            view(self.query),
            view(self.key),
            view(self.value),
            view(self.mask),
            _address(self.slopes),
            heads if self.slopes is not None and self.slopes.dim() == 2 else 0,
            _address(self.sinks),
            _address(self.seed),
            0 if self.seed is None else self.seed.dim(),
            _address(self.offsets[0]),
            _address(self.offsets[1]),
        )
        dropped = (drop_below(dropout_p), 1.0 / (1.0 - dropout_p)) if dropout_p else (0, 1.0)
        self.options = (left, right, scale, softcap, *dropped)


# ---- the CPU ----------------------------------------------------------------------------------------------------------------


def _forward_cpu(query, key, value, *rest):
    out, lse = empty_results(query, value.shape[3])
    call = Call(query, key, value, *rest)
    native.C.attention_forward(call.sizes, call.inputs, call.options, view(out), view(lse), torch.get_num_threads())
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
    call = Call(query, key, value, mask, sinks, *rest[:4], *options)
    native.C.attention_backward(
        call.sizes,
        call.inputs,
        call.options,
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

_DIFFERENTIABLE = 5  # query, key, value, mask, sinks: the first of the tensors


def _save(ctx, args, outputs) -> None:
    ctx.save_for_backward(*args[:_TENSORS], *outputs)
    ctx.options = args[_TENSORS:]
    ctx.set_materialize_grads(False)


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
        outputs = _forward_op(*args)
        _save(ctx, args, outputs)
        return outputs

    backward = staticmethod(once_differentiable(_gradients))


class _AttentionForFunctorch(torch.autograd.Function):
    """The same for torch.func's transforms, which ask for the two halves of forward apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _forward_op(*args)

    setup_context = staticmethod(_save)
    backward = staticmethod(once_differentiable(_gradients))


def attend(
    query, key, value, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap, dropout_p
) -> tuple[Tensor, Tensor]:
    """(out, lse) by the op, with gradients where an input asks for them."""
    args = (query, key, value, mask, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k)
    args += (left, right, scale, softcap, dropout_p)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:_DIFFERENTIABLE]):
        under_functorch = torch._C._are_functorch_transforms_active()
        return (_AttentionForFunctorch if under_functorch else _Attention).apply(*args)
    return _forward_op(*args)
