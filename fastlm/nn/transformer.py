"""torch.nn.TransformerEncoder and its layer with another eval path: it calls ``self_attn``, and packs padded batches.

In eval mode torch's layer does not call its module ``self_attn``, but a kernel for a whole layer
(torch._transformer_encoder_layer_fwd). Batches that are padded at the end go through it as nested tensors, so that nothing is
computed for padding. Here the sequences of such a batch are packed one after the other, for `fastlm.varlen_attention`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from ..ops.attention import has_kernel
from ..ops.torch_op import are_plain
from .multihead_attention import MultiheadAttention
from .replace import ClassSwap, register
from .running import is_ours
from .tracing import call_of_leaf, forward_for_script
from .why_not import only_math_is_enabled


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer that attends by its module ``self_attn`` in eval mode too."""

    _scripted_forward = forward_for_script(nn.TransformerEncoderLayer)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Do what ``torch.nn.TransformerEncoderLayer.forward`` does; nested tensors go to torch's own kernel."""
        if torch.jit.is_scripting():
            return self._scripted_forward(src, src_mask, src_key_padding_mask, is_causal)
        else:
            return self._forward(src, src_mask, src_key_padding_mask, is_causal)

    def _forward(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        leaf = call_of_leaf(self, src, mask, padding, is_causal)
        if leaf is not None:
            return leaf
        if src.is_nested or torch.jit.is_tracing():
            return super().forward(src, mask, padding, is_causal)
        return self._layer(src, lambda x: self._sa_block(x, mask, padding, is_causal=is_causal))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Run the layer in eval mode on packed sequences (total, E), which do not see each other."""
        return self._layer(x, lambda x: self.self_attn.forward_packed(x, cu_seqlens, max_seqlen))

    def _layer(self, x: Tensor, attend) -> Tensor:
        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + self._ff_block(x))


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder that packs a padded batch where torch makes it a nested tensor."""

    _scripted_forward = forward_for_script(nn.TransformerEncoder)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Do what ``torch.nn.TransformerEncoder.forward`` does; where torch makes nested tensors, padding gives zeros."""
        if torch.jit.is_scripting():
            return self._scripted_forward(src, mask, src_key_padding_mask, is_causal)
        else:
            return self._forward(src, mask, src_key_padding_mask, is_causal)

    def _forward(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool | None) -> Tensor:
        leaf = call_of_leaf(self, src, mask, padding, is_causal)
        if leaf is not None:
            return leaf
        if torch.jit.is_tracing() or src.is_nested or not are_plain((src, mask, padding)):
            return super().forward(src, mask, padding, is_causal)
        other = F._none_or_dtype(mask)  # as torch's forward makes both masks canonical, with its errors and warnings
        padding = F._canonical_mask(padding, "src_key_padding_mask", other, "mask", src.dtype)
        mask = F._canonical_mask(mask, "mask", None, "", src.dtype, check_other=False)
        if self._torch_nests(src, mask, padding):
            out = self._through_layers_nested(src, padding)
        else:
            first = self.layers[0]
            is_causal = _detect_is_causal_mask(mask, is_causal, _get_seq_len(src, first.self_attn.batch_first))
            out = self._through_layers(src, mask, padding, is_causal)
        return out if self.norm is None else self.norm(out)

    def _torch_nests(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
        """Return whether torch's forward makes a nested tensor of this batch, by its conditions in their order."""
        # The user's switch, and not that function, which is ours inside `fastlm.use`.
        if not torch.backends.mha._is_fastpath_enabled or not getattr(self, "use_nested_tensor", False):
            return False
        first, check = self.layers[0], getattr(self, "mask_check", True)
        if first.training or src.dim() != 3 or padding is None or not src.numel():
            return False
        if check and (torch.compiler.is_compiling() or not _is_padded_at_end(src, padding)):
            return False
        if mask is not None or torch.is_autocast_enabled(src.device.type):  # torch's path fails under the CPU's autocast
            return False
        attention = first.self_attn
        weights = (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias)
        weights += tuple(p for m in (first.norm1, first.norm2, first.linear1, first.linear2) for p in (m.weight, m.bias))
        if torch.overrides.has_torch_function((src, *weights)):  # any TorchFunctionMode counts, torch.device(...) too
            return False
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in (src, *weights) if t is not None)

    def _through_layers(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        return x

    def _through_layers_nested(self, src: Tensor, padding: Tensor) -> Tensor:
        """Run the layers on the tokens; padding gives zeros in the output (N, S, E). torch ignores ``is_causal`` here."""
        lengths = padding.logical_not().sum(dim=1)  # anything but 0 is padding
        keep = torch.arange(src.shape[1], device=src.device) < lengths[:, None]  # (N, S), as in torch without mask_check
        if not self._can_be_packed(src):
            padding = torch.zeros_like(padding).masked_fill(~keep, -torch.inf)
            return self._through_layers(src, None, padding, False).masked_fill(~keep[..., None], 0.0)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        x, max_seqlen = src[keep], int(lengths.max())
        for layer in self.layers:
            x = layer.forward_packed(x, cu_seqlens, max_seqlen)
        out = x.new_zeros(src.shape)
        out[keep] = x
        return out

    def _can_be_packed(self, src: Tensor) -> bool:
        """Return whether fastlm's kernels take the batch, and packing skips no hook, gradient or code of the layers."""
        if torch.compiler.is_compiling() or only_math_is_enabled() or torch.is_grad_enabled() and src.requires_grad:
            return False
        if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
            return False
        head = src[..., : self.layers[0].self_attn.head_dim]
        return has_kernel(head, head) and all(map(_layer_can_be_packed, self.layers))


def _is_padded_at_end(src: Tensor, padding: Tensor) -> bool:
    return bool(torch._nested_tensor_from_mask_left_aligned(src, padding.logical_not()))


def _layer_can_be_packed(layer: nn.Module) -> bool:
    if type(layer) is not TransformerEncoderLayer or type(layer.self_attn) is not MultiheadAttention:
        return False
    attention = layer.self_attn
    plain = attention.batch_first and attention.in_proj_weight is not None and not attention.add_zero_attn
    return plain and attention.bias_k is None and "_sa_block" not in vars(layer) and all(map(_is_at_rest, layer.modules()))


def _is_at_rest(module: nn.Module) -> bool:
    """Return whether a module is in eval mode, without others' hooks or a forward of its own, with plain weights at rest."""
    if module.training or "forward" in vars(module):
        return False
    if not all(map(is_ours, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
        return False
    weights = module._parameters.values()
    wanted = torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights)
    return are_plain(weights) and not wanted


class _ContainerSwap(ClassSwap):
    """The swap of a container, for the sake of the attention in it."""

    def why_not(self, module: nn.Module) -> str | None:
        own = any(type(m) in (nn.MultiheadAttention, MultiheadAttention) for m in module.modules())
        return None if own else "there is no torch.nn.MultiheadAttention in it"


register(_ContainerSwap(nn.TransformerEncoderLayer, TransformerEncoderLayer))
register(_ContainerSwap(nn.TransformerEncoder, TransformerEncoder))
