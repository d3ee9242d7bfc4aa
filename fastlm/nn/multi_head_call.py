"""torch.nn.functional.multi_head_attention_forward on fastlm's kernels."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention, has_kernel
from ..ops.linear import linear
from . import handwritten
from .why_not import call_why_not, mask_dtype_fits


@dataclass(slots=True)
class MultiHeadCall:
    """A call of ``torch.nn.functional.multi_head_attention_forward``, with that function's parameters, order and defaults.

    Shapes: query (L, N, E), key (S, N, Ek), value (S, N, Ev), or without N; key_padding_mask (N, S); attn_mask (L, S) or
    (N * heads, L, S). The masks are bool (True: do not attend) or floating (added to the scores). ``batch_first``, an addition
    of ours, puts N before L and S.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    training: bool = True
    key_padding_mask: Tensor | None = None
    need_weights: bool = True
    attn_mask: Tensor | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: Tensor | None = None
    k_proj_weight: Tensor | None = None
    v_proj_weight: Tensor | None = None
    static_k: Tensor | None = None
    static_v: Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False
    batch_first: bool = False

    # ---- calls for torch: those that no kernel can run, and wrong ones, for which torch has its errors and warnings ---------

    def why_not(self) -> str | None:
        """Return why torch's own function must run this call, or None."""
        if reason := call_why_not(self._tensors):
            return reason
        if self.need_weights and (
            self.add_zero_attn or not weights_can_wait(self.query, self.key, self.num_heads, self.batch_first)
        ):
            return "need_weights asks for weights, which are few, or cannot wait until they are read"
        if self.static_k is not None or self.static_v is not None:
            return "static_k and static_v are not fused"
        if any(t.is_nested for t in (self.query, self.key, self.value)):
            return "nested tensors are not fused"
        if not (self._inputs_fit() and self._weights_fit() and self._masks_fit()):
            return "the arguments do not fit together as the fused path expects them to"
        head = self.query  # On CPUs its size does not matter, and a slice takes as long as all other questions.
        if not head.is_cpu:
            head = head[..., : self.embed_dim_to_check // self.num_heads]
        if not has_kernel(head, head):
            return f"no kernel takes {self.query.dtype} on {self.query.device}"
        return None

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.query, self.key, self.value, self.key_padding_mask, self.attn_mask, *self._weights

    @property
    def _weights(self) -> tuple[Tensor | None, ...]:
        one, separate = (self.in_proj_weight,), (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        projections = separate if self.use_separate_proj_weight else one
        return *projections, self.in_proj_bias, self.out_proj_weight, self.out_proj_bias, self.bias_k, self.bias_v

    def _inputs_fit(self) -> bool:
        query, key, value, embed_dim = self.query, self.key, self.value, self.embed_dim_to_check
        if not (query.dim() == key.dim() == value.dim() and query.dim() in (2, 3) and query.shape[-1] == embed_dim):
            return False
        batch_fits = query.dim() == 2 or query.shape[self._batch_dim] == key.shape[self._batch_dim]
        return batch_fits and key.shape[:-1] == value.shape[:-1] and embed_dim % self.num_heads == 0

    def _weights_fit(self) -> bool:
        if self.use_separate_proj_weight:
            given = all(w is not None for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        else:
            given = self.in_proj_weight is not None and self.key.shape == self.value.shape
        return given and (self.bias_k is None) == (self.bias_v is None) and 0.0 <= self._dropout <= 1.0 and self._dtypes_fit()

    def _dtypes_fit(self) -> bool:
        """Return whether all products have one dtype, if need be by autocast."""
        tensors = (self.query, self.key, self.value, *self._weights)
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        return len(dtypes) == 1 or torch.is_autocast_enabled(self.query.device.type)

    def _masks_fit(self) -> bool:
        padding, mask = self.key_padding_mask, self.attn_mask
        if padding is None and mask is None:
            return not self.is_causal
        rows, keys, batch = self._rows(self.query), self._rows(self.key), self._batch
        added = self.bias_k is not None or self.add_zero_attn  # adds a last key, which torch's causal hint hides
        if self.is_causal and (mask is None or rows != keys or added):
            return False
        if padding is not None and padding.shape != ((batch, keys) if self._batched else (keys,)):
            return False
        if mask is not None and mask.shape not in ((rows, keys), (batch * self.num_heads, rows, keys)):
            return False
        given = [m for m in (padding, mask) if m is not None]
        if all(m.dtype == torch.bool for m in given):
            return True
        return all(m.is_floating_point() and mask_dtype_fits(m, self.query) for m in given)

    # ---- sizes --------------------------------------------------------------------------------------------------------------

    @property
    def _batched(self) -> bool:
        return self.query.dim() == 3

    @property
    def _batch_dim(self) -> int:
        return 0 if self.batch_first else 1

    @property
    def _batch(self) -> int:
        return self.query.shape[self._batch_dim] if self._batched else 1

    def _rows(self, tensor: Tensor) -> int:
        return tensor.shape[1 - self._batch_dim] if self._batched else tensor.shape[0]

    @property
    def _dropout(self) -> float:
        return self.dropout_p if self.training else 0.0

    # ---- the fused call -----------------------------------------------------------------------------------------------------

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Run the call, for which `why_not` must be None; return (output in query's shape, weights or None).

        The weights are a deferred tensor, computed if somebody reads them.
        """
        query, key, value = self._projected()
        if self.bias_k is not None:
            key, value = (torch.cat([t, self._bias_row(bias)], dim=2) for t, bias in ((key, self.bias_k), (value, self.bias_v)))
        causal = self.is_causal and self.key_padding_mask is None  # torch ignores the hint where there is padding
        weights = None
        if self.need_weights:
            weights = self._deferred_weights(query, key)
            out = weights @ value
            weights = weights.mean(dim=1) if self.average_attn_weights else weights
            weights = weights if self._batched else weights.squeeze(0)
        else:
            # A key and a value of zeros add a score of 0 and no value, as a sink of 0 does.
            sinks = query.new_zeros(self.num_heads) if self.add_zero_attn else None
            mask = None if causal else self._mask()
            out = attention(query, key, value, mask=mask, causal=causal, dropout_p=self._dropout, sinks=sinks)
        if not self._batched:
            out = out[0].transpose(0, 1)  # (L, H, D)
        elif self.batch_first:
            out = out.transpose(1, 2)  # (N, L, H, D)
        else:
            out = out.permute(2, 0, 1, 3)  # (L, N, H, D)
        return linear(out.flatten(-2), self.out_proj_weight, self.out_proj_bias), weights

    def _deferred_weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the weights (N, H, L, S), after dropout as torch's are, as a deferred tensor if possible."""
        operands = query, key.transpose(-2, -1)
        scores = handwritten.begin(torch.matmul, operands, {}, handwritten.uncounted)
        scores = torch.matmul(*operands) if scores is None else scores
        scores, mask = scores * query.shape[-1] ** -0.5, self._mask()
        if mask is not None:
            scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
        return F.dropout(scores.softmax(-1), self._dropout)

    def _projected(self) -> tuple[Tensor, ...]:
        """Project to queries, keys and values, (N, H, L or S, D), with one product for all that come from the same tensor."""
        query, key, value, bias = self.query, self.key, self.value, self.in_proj_bias
        if self.use_separate_proj_weight:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return sum((self._heads(x, w, b, 1) for x, w, b in zip((query, key, value), weights, biases)), ())
        if query is key and key is value:
            return self._heads(query, self.in_proj_weight, bias, 3)
        parts = (1, 2) if key is value else (1, 1, 1)
        sizes = [n * self.embed_dim_to_check for n in parts]
        weights = self.in_proj_weight.split(sizes)
        biases = (None,) * 3 if bias is None else bias.split(sizes)
        return sum((self._heads(x, w, b, n) for x, w, b, n in zip((query, key, value), weights, biases, parts)), ())

    def _heads(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> tuple[Tensor, ...]:
        """Compute ``parts`` projections of ``x`` at once; return each as a view (N, H, rows, D) of one product."""
        product = _linear(x, weight, bias)
        heads = product.view(*product.shape[:-1], parts, self.num_heads, self.embed_dim_to_check // self.num_heads)
        if not self._batched:
            return heads.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        return heads.permute((2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)).unbind(0)

    def _bias_row(self, bias: Tensor) -> Tensor:
        """Return one more key or value (N, H, 1, D), the same for each example."""
        return bias.view(1, self.num_heads, 1, -1).expand(self._batch, -1, -1, -1)

    def _mask(self) -> Tensor | None:
        """Merge both masks into the smallest one, (N or 1, H or 1, L or 1, S): bool (True: attend), or added to the scores."""
        padding, mask = self.key_padding_mask, self.attn_mask
        if padding is not None:
            padding = padding.view(self._batch, 1, 1, padding.shape[-1])
        if mask is not None:
            mask = mask if mask.dim() == 2 else mask.view(self._batch, self.num_heads, *mask.shape[1:])
        if padding is None and mask is None:
            return None
        if padding is None or mask is None:
            merged = mask if padding is None else padding
        else:
            merged = padding | mask if mask.dtype == torch.bool else padding + mask
        if self.bias_k is not None:
            merged = F.pad(merged, (0, 1))  # the added key is never hidden
        return ~merged if merged.dtype == torch.bool else merged


def weights_can_wait(query: Tensor, key: Tensor, heads: int, batch_first: bool) -> bool:
    """Tell whether it pays to compute the weights of a call only if they are read."""
    if torch.compiler.is_compiling() or query.is_nested or key.is_nested or query.dim() not in (2, 3) or key.dim() < 2:
        return False
    keys = key.shape[-2] if batch_first or key.dim() == 2 else key.shape[0]
    return handwritten.pays(query.numel() // max(query.shape[-1], 1) * heads * keys, keys, query, key)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute linear without the copy that it makes of an ``x`` (rows, batch, E) that is a transpose."""
    if x.dim() == 3 and not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
        return linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    return linear(x, weight, bias)
