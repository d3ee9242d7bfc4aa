"""torch.nn.MultiheadAttention on fastlm's kernels."""

import torch
from torch import Tensor

from ..ops.attention import varlen_attention
from ..ops.linear import linear
from .multi_head_call import MultiHeadCall, weights_can_wait
from .replace import ClassSwap, register
from .running import inside
from .tracing import call_of_leaf, forward_for_script


class MultiheadAttention(torch.nn.MultiheadAttention):
    """A drop-in for ``torch.nn.MultiheadAttention`` with the same constructor, forward, state_dict and results.

    A call is fused: it reads queries, keys and values where the projection leaves them, and never stores the scores or a mask
    of their size. A query that sees no key gets zeros. With ``need_weights``, torch's default, the weights that are returned
    are a tensor that is computed when somebody reads it. torch's own code runs in these cases: calls that ask for few weights,
    or for weights with ``add_zero_attn`` or under torch.compile, nested tensors, subclasses of Tensor (but DTensor), calls
    inside ``sdpa_kernel(SDPBackend.MATH)``, torch.jit.trace, torch.jit.script, dtypes and devices that no kernel takes, and bad
    input, for which torch raises its own errors. torch.fx.symbolic_trace makes one node of the module, as it does of torch's.
    """

    _scripted_forward = forward_for_script(torch.nn.MultiheadAttention)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what ``torch.nn.MultiheadAttention.forward`` does, whose documentation describes the arguments."""
        if torch.jit.is_scripting():
            return self._scripted_forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        else:
            return self._attend(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)

    def _attend(self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal):
        """Run the call fused, or by torch's own code."""
        given = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        leaf = call_of_leaf(self, *given)
        if leaf is not None:
            return leaf
        if need_weights and not weights_can_wait(query, key, self.num_heads, self.batch_first):
            return super().forward(*given)  # without a record of the call, which small ones would feel
        # A look-up of a parameter takes Module.__getattr__ longer than anything else here.
        out_proj, in_proj_weight = self.out_proj, self.in_proj_weight
        separate = (None,) * 3 if in_proj_weight is not None else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        call = MultiHeadCall(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            out_proj.weight,
            out_proj.bias,
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            in_proj_weight is None,
            *separate,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            batch_first=self.batch_first,
        )
        if call.why_not() is None:
            return call.run()
        return super().forward(*given)

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Attend in eval mode within packed sequences (total, E): see `fastlm.varlen_attention`."""
        heads = linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        with inside(self):
            out = varlen_attention(*heads.unbind(1), cu_seqlens, cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
        return linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)


class _AttentionSwap(ClassSwap):
    """The swap of a module whose calls may ask for weights."""

    def swap(self, module: torch.nn.MultiheadAttention) -> str:
        weights = "calls for weights are left because of add_zero_attn" if module.add_zero_attn else "weights wait for a reader"
        return f"{super().swap(module)} (calls are fused; {weights})"


register(_AttentionSwap(torch.nn.MultiheadAttention, MultiheadAttention))
