"""Routing attention calls to fastlm in code that one cannot edit."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops.attention import has_kernel, scaled_dot_product_attention
from ..ops.torch_op import PLAIN
from .multi_head_call import MultiHeadCall
from .why_not import SUBCLASS, call_why_not, mask_dtype_fits


class use(TorchFunctionMode):  # noqa: N801 (read as a verb: `with fastlm.use():`)
    """Run ``F.scaled_dot_product_attention`` on fastlm's kernels inside ``with fastlm.use() as report:``.

    The block also routes ``F.multi_head_attention_forward``, and so every torch.nn.MultiheadAttention and the layers of
    torch.nn.Transformer. It does not matter how the function was imported. Under ``torch.compile``, code that was compiled
    outside is compiled again inside, and the other way round. The block holds for the thread that entered it. After it,
    everything is as before. The backward of calls in the block may run anywhere, but a recomputation by torch.utils.checkpoint
    must run inside too.

    torch's own function runs what kernels cannot do: other dtypes and devices, nested tensors and other subclasses of Tensor
    (such as DTensor), calls for attention weights, calls inside ``sdpa_kernel(SDPBackend.MATH)`` or torch.jit.trace, and bad
    input, for which torch raises its own errors.

    Attributes, in which compiled code does not count:
        routed: the number of calls that ran on fastlm.
        left: for each reason, the number of calls that were left to torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.routed = 0
        self.left: Counter[str] = Counter()

    def __str__(self) -> str:
        lines = [f"{self.routed} calls of attention ran on fastlm, {self.left.total()} were left to torch"]
        return "\n".join(lines + [f"  {count} times: {reason}" for reason, count in self.left.items()])

    __repr__ = __str__

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(types, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._attend_with_projections(types, args, kwargs)
        return func(*args, **kwargs)

    def _attend(self, types: tuple, args: tuple, kwargs: dict) -> Tensor:
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        reason = _class_why_not(types) or call_why_not(tensors) or _why_not(*args, **kwargs)
        if reason is None:
            try:
                out = scaled_dot_product_attention(*args, **kwargs)
                self._count(None)
                return out
            except (TypeError, ValueError) as error:
                reason = str(error)
        self._count(reason)
        return F.scaled_dot_product_attention(*args, **kwargs)

    def _attend_with_projections(self, types: tuple, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        call = MultiHeadCall(*args, **kwargs)
        reason = _class_why_not(types) or call.why_not()
        self._count(reason)
        return call.run() if reason is None else F.multi_head_attention_forward(*args, **kwargs)

    def _count(self, reason: str | None) -> None:
        if torch.compiler.is_compiling():  # the compiled code would depend on the count
            return
        if reason is None:
            self.routed += 1
        else:
            self.left[reason] += 1


def _class_why_not(types: tuple[type, ...]) -> str | None:
    """Return why a call with arguments of these classes, tensors or not, is left to torch, or None."""
    return None if PLAIN.issuperset(types) else SUBCLASS


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Return why a call of ``F.scaled_dot_product_attention`` is left to torch, or None."""
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensors are not fused"
    if not query.shape[-1]:
        return "the vectors of query have no elements"
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        return "enable_gqa without a dimension of heads"
    if attn_mask is not None and (attn_mask.dim() < 2 or not mask_dtype_fits(attn_mask, query)):
        return "attn_mask is not of the dimensions or dtypes that torch takes"
    if not has_kernel(query, value):
        return f"no kernel takes {query.dtype} on {query.device}"
    return None
