"""torch.nn.TransformerEncoder and its layer, whose eval path calls their attention, and packs what is padded.

In eval mode torch's own go past the module ``self_attn`` to a kernel for a whole layer (torch._transformer_encoder_layer_fwd),
and padded batches go through it as nested tensors, so that nothing is computed for padding. Here the sequences of a padded
batch are packed one after the other, as `fastlm.varlen_attention` takes them.
"""

import torch
from torch import Tensor

from ..ops.attention import has_kernel
from .multihead_attention import MultiheadAttention
from .replace import ClassSwap, register


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch's, whose attention is in eval mode, too, that of the module ``self_attn``."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As ``torch.nn.TransformerEncoderLayer.forward``. Nested tensors are for torch's own kernel."""
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        return self._layer(src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The layer in eval mode on sequences (total, E) that lie one after the other, each for itself."""
        return self._layer(x, lambda x: self.self_attn.forward_packed(x, cu_seqlens, max_seqlen))

    def _layer(self, x: Tensor, attend) -> Tensor:
        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + self._ff_block(x))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch's, which packs a padded batch where torch makes it a nested tensor."""

    @property
    def use_nested_tensor(self) -> bool:
        """What torch's forward asks before it makes a nested tensor: no. What was set stays in the instance's ``__dict__``."""
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, use: bool) -> None:
        self.__dict__["use_nested_tensor"] = use

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As ``torch.nn.TransformerEncoder.forward``: what comes of padding is zeros where torch makes nested tensors."""
        if mask is None and not is_causal and self._packs(src, src_key_padding_mask):
            return self._forward_packed(src, src_key_padding_mask)
        return super().forward(src, mask, src_key_padding_mask, is_causal)

    def _packs(self, src: Tensor, padding: Tensor | None) -> bool:
        """Whether torch would make a nested tensor of this batch (left-aligned or not), and fastlm's kernels take it."""
        if self.training or padding is None or not self.__dict__.get("use_nested_tensor") or torch.compiler.is_compiling():
            return False
        rows = (src.shape[0], src.shape[1]) if self._batch_first else (src.shape[1], src.shape[0])
        if src.is_nested or src.dim() != 3 or padding.dtype != torch.bool or padding.shape != rows:
            return False
        if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.layers.modules()):
            return False  # a hook of a layer expects a padded batch
        head = src[..., : self.layers[0].self_attn.head_dim]
        return has_kernel(head, head) and all(_can_be_packed(layer) for layer in self.layers)

    @property
    def _batch_first(self) -> bool:
        return self.layers[0].self_attn.batch_first

    def _forward_packed(self, src: Tensor, padding: Tensor) -> Tensor:
        keep = ~padding  # (N, S)
        lengths = keep.sum(dim=1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        padded = src if self._batch_first else src.transpose(0, 1)  # (N, S, E)
        x, max_seqlen = padded[keep], int(lengths.max())
        for layer in self.layers:
            x = layer.forward_packed(x, cu_seqlens, max_seqlen)
        out = x.new_zeros(padded.shape)
        out[keep] = x
        out = out if self._batch_first else out.transpose(0, 1)
        return out if self.norm is None else self.norm(out)


def _can_be_packed(layer: torch.nn.Module) -> bool:
    return type(layer) is TransformerEncoderLayer and type(layer.self_attn) is MultiheadAttention


class _ContainerSwap(ClassSwap):
    """A container, which is swapped for the sake of the attention inside."""

    def why_not(self, module: torch.nn.Module) -> str | None:
        own = any(type(m) in (torch.nn.MultiheadAttention, MultiheadAttention) for m in module.modules())
        return None if own else "there is no torch.nn.MultiheadAttention in it"


register(_ContainerSwap(torch.nn.TransformerEncoderLayer, TransformerEncoderLayer))
register(_ContainerSwap(torch.nn.TransformerEncoder, TransformerEncoder))
