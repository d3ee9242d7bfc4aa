"""The attention function that transformers' models call when they run on fastlm."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from ...distributed import context
from ...ops.attention import attention
from ...ops.tensor_classes import are_known
from .continuous_batching import attend_batch, is_batched
from .mask import as_eager_mask, read_mask
from .sequences import Sequences, as_mask, attend_packed, is_packed, sequences_of
from .traits import Traits, traits_of


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attend for transformers' attention modules, by the convention of its AttentionInterface.

    Args:
        module: the attention, whose training flag switches the dropout.
        query, key, value: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv).
        attention_mask: a mask of `make_mask`, or a user's own, bool or float. None hides nothing, as in eager: ``is_causal``
            and ``sliding_window`` among ``kwargs`` add nothing to the mask, but in continuous batching, where there is none.
            ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (sequences + 1,) among them say where packed sequences begin.
        dropout: the probability to drop a weight in training.
        s_aux: (Hq,), the heads' sinks.
        position_bias: floating, broadcastable to (B, Hq, Lq, Lk). It is added to the scores, and gets a gradient.

    Returns:
        The output (B, Lq, Hq, Dv), contiguous, and None, or the weights if the call asks for them.

    Raises:
        NotImplementedError: the module prepares its mask for other implementations only; or fastlm cannot take the call, or
            has packed sequences, and `fastlm.distributed.context_parallel` is open, or requests are batched continuously.
        ValueError: packed sequences are in a batch of several rows.
    """
    traits = traits_of(type(module))
    collected = _active_collector.get()  # some models collect weights without asking for them
    output_attentions = output_attentions or (collected and any("attentions" in name for name in collected))
    batched = is_batched(kwargs)
    sequences = None
    if not batched:
        sequences, attention_mask = _packed(query, key, attention_mask, kwargs, position_bias is not None)
    plain = not torch.jit.is_tracing() and are_known((query, key, value, attention_mask, s_aux, position_bias))
    if not plain or traits.unknown or traits.for_others or output_attentions or query.shape[0] != key.shape[0]:
        reason = _why_eager(module, traits, plain, query.shape[0] != key.shape[0], output_attentions, kwargs)
        if reason is not None:
            where = "in context_parallel" if context.is_open() else "in continuous batching" if batched else None
            if where is not None:
                raise NotImplementedError(f"{type(module).__name__} cannot run {where}: {reason}")
            options = {
                "dropout": dropout,
                "scaling": scaling,
                "softcap": softcap,
                "s_aux": s_aux,
                "position_bias": position_bias,
            }
            options |= {"output_attentions": output_attentions, **kwargs}
            if sequences is not None:
                attention_mask = as_mask(sequences, query.shape[2], key.shape[2])
            return _attend_eagerly(module, traits.eager, reason, query, key, value, attention_mask, options)
    options = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if batched:
        return attend_batch(query, key, value, kwargs, **options), None
    options["dropout_p"] = dropout if module.training else 0.0
    if sequences is not None:
        return attend_packed(query, key, value, sequences, **options), None
    causal, window, attention_mask = read_mask(attention_mask)
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias)
    if query.shape[2] == 1:
        query = query.squeeze(2).unsqueeze(2)  # makes strides canonical: decoding costs less
    run = context.attend if context.is_open() else attention
    out = run(query, key, value, mask=attention_mask, causal=causal, window=window, **options)
    return out.transpose(1, 2).contiguous(), None  # no copy where the query was a transposed (B, Lq, Hq, D)


def _packed(
    query: Tensor, key: Tensor, mask: Tensor | None, given: dict, needs_mask: bool
) -> tuple[Sequences | None, Tensor | None]:
    """Return the packed sequences of a call and None, or, if it has none or needs a mask, None and its mask.

    The sequences are those of flash attention's arguments, if they are given, and otherwise those in place of the mask.
    """
    sequences, rest = (sequences_of(mask), None) if is_packed(mask) else (None, mask)
    bounds = given.get("cu_seq_lens_q")
    if bounds is not None:
        if query.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q needs a batch of one row of packed sequences; got {query.shape[0]} rows")
        if context.is_open():
            raise NotImplementedError("context_parallel has no packed sequences: cu_seq_lens_q")
        causal, window, rest = read_mask(mask) if sequences is None else (sequences.causal, sequences.window, None)
        sequences = Sequences(bounds, given.get("cu_seq_lens_k", bounds), causal, window)
    if sequences is None or (rest is None and not needs_mask):
        return sequences, rest
    allowed = as_mask(sequences, query.shape[2], key.shape[2])
    if rest is not None:
        allowed = allowed & rest if rest.dtype is torch.bool else _with_bias(allowed, rest)
    return None, allowed


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Merge a mask and a bias into one float mask."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _why_eager(
    module: nn.Module, traits: Traits, plain: bool, broadcast: bool, weights: bool | None, kwargs: dict
) -> str | None:
    """Return why a call must run the model's eager function, or None."""
    if traits.for_others:
        raise NotImplementedError(f"{type(module).__name__} {traits.for_others}: use attn_implementation='sdpa' or 'eager'")
    if weights:
        return "attention weights were asked for (output_attentions)"
    if broadcast:
        return "queries and keys have different batch sizes"
    if not plain:
        return "torch.jit.trace or a subclass of Tensor"
    given = [name for name in traits.unknown if kwargs.get(name) is not None]
    return f"fastlm has no {', '.join(given)}" if given else None


_warned: set[tuple[str, str]] = set()


def _attend_eagerly(
    module: nn.Module,
    eager: Callable | None,
    reason: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict,
) -> tuple[Tensor, Tensor]:
    """Run the model's own eager function, and warn once for each class and reason."""
    name = type(module).__name__
    if eager is None:
        raise NotImplementedError(f"{name} has no eager attention to fall back to, and {reason}")
    if (name, reason) not in _warned and not torch.compiler.is_compiling():
        _warned.add((name, reason))
        warnings.warn(f"fastlm: {name} runs on transformers' eager attention: {reason}", stacklevel=4)
    return eager(module, query, key, value, as_eager_mask(mask, query, key), **options)
