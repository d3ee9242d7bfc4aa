"""Padded batches of encoders, packed: padding is dropped before the first layer, and comes back as zeros after the last.

Between its attentions an encoder like BERT's treats each token by itself, so that padding is only work. After `fastlm.replace`,
a forward pre-hook of the encoder takes the tokens out of (B, L, hidden) as (1, tokens, hidden), its layers run on those, their
attention by `fastlm.varlen_attention` (sequences.py), and a forward hook puts the tokens back.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from transformers.utils import output_capturing

from ...nn.running import is_ours
from ...ops.torch_op import are_plain
from .hooks import add_hooks, has_hook, remove_hooks
from .sequences import PACKED

# Encoders that are token-wise but for attention, and hand their mask on as they get it.
ENCODERS = {
    ("albert", "AlbertTransformer"),
    ("bert", "BertEncoder"),
    ("camembert", "CamembertEncoder"),
    ("distilbert", "Transformer"),
    ("electra", "ElectraEncoder"),
    ("roberta", "RobertaEncoder"),
    ("roberta_prelayernorm", "RobertaPreLayerNormEncoder"),
    ("xlm_roberta", "XLMRobertaEncoder"),
    ("xlm_roberta_xl", "XLMRobertaXLEncoder"),
}


def is_encoder(module: nn.Module) -> bool:
    """Return whether a module is an encoder whose batches can be packed."""
    package, _, kind = type(module).__module__.rpartition(".modeling_")
    return package.startswith("transformers.models.") and (kind, type(module).__name__) in ENCODERS


_TOKENS = "fastlm_tokens"  # the attribute of a mask that has the tokens (B, keys) it was made of


def padding_mask(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return tokens (B, keys), True at a token, as a mask (B, 1, queries, keys) from which a batch can be packed."""
    mask = tokens[:, None, None].expand(shape)
    if not torch.compiler.is_compiling():
        setattr(mask, _TOKENS, tokens)
    return mask


# ---- the hooks --------------------------------------------------------------------------------------------------------------


def _pack(encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Take the tokens out of a padded batch: a forward pre-hook."""
    if len(args) > 2 or torch.compiler.is_compiling() or torch.jit.is_tracing():  # The number of tokens is not the graph's.
        return None
    given = {**kwargs, **dict(zip(("hidden_states", "attention_mask"), args))}
    hidden, tokens = given.get("hidden_states"), getattr(given.get("attention_mask"), _TOKENS, None)
    if tokens is None or not are_plain((hidden,)) or hidden.shape[:2] != tokens.shape or not _may_pack(encoder, given):
        return None
    places = tokens.flatten().nonzero().squeeze(1)
    if not len(places):  # Layers cannot take a batch without tokens.
        return None
    bounds = nn.functional.pad(tokens.sum(1).cumsum(0, dtype=PACKED), (1, 0))  # (B + 1,)
    bounds.batch, bounds.places = tokens.shape, places
    packed = hidden.flatten(0, 1).index_select(0, places).unsqueeze(0)
    return (), {**given, "hidden_states": packed, "attention_mask": bounds}


def _unpack(encoder: nn.Module, args: tuple, kwargs: dict, output):
    """Put the tokens of the encoder's output back where they were: a forward hook."""
    bounds = kwargs.get("attention_mask")
    if not hasattr(bounds, "places"):
        return None
    packed = output.last_hidden_state[0]  # (tokens, hidden)
    places = bounds.places.to(packed.device)  # The layers may be on several.
    padded = packed.new_zeros(bounds.batch.numel(), packed.shape[1]).index_copy(0, places, packed)
    output.last_hidden_state = padded.view(*bounds.batch, -1)
    return output


def _may_pack(encoder: nn.Module, given: dict) -> bool:
    """Return whether all that the encoder is given is packed or unused, and nobody looks into it."""
    unused = ("encoder_hidden_states", "encoder_attention_mask", "cache")
    if any(given.get(name) is not None for name in unused) or given.get("use_cache"):
        return False
    if output_capturing._active_collector.get() or any(getattr(hooks_of_all, name) for name in _OF_ALL_MODULES):
        return False
    return all(map(_is_known, encoder.modules()))


_LIBRARIES = ("torch.", "transformers.", "fastlm.", "peft.")
_OWN = (output_capturing.__name__, __name__)  # Hooks of transformers' collect what an active collector asks for.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_ALL_MODULES = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks", "_global_backward_hooks")


def _is_known(module: nn.Module) -> bool:
    """Return whether a module of the encoder is one of a library's, which runs as it was written, and no hook looks in."""
    own = vars(module)
    if not type(module).__module__.startswith(_LIBRARIES) or "forward" in own or own.get("chunk_size_feed_forward"):
        return False
    hooks = (hook for name in _HOOKS for hook in own[name].values())
    return all(is_ours(hook) or getattr(hook, "__module__", None) in _OWN for hook in hooks)


# ---- which encoders have them -----------------------------------------------------------------------------------------------

_CLOSED = "fastlm_computes_padding"


def reads_padding(model: nn.Module) -> bool:
    """Return whether a model reads the encoder's output where there is padding, without a mask."""
    summary = getattr(model.config, "summary_type", "first")  # ELECTRA's
    return type(model).__name__.endswith("ForQuestionAnswering") or summary not in ("first", "cls_index")


def close(encoder: nn.Module) -> None:
    """Keep the encoder's padded batches from being packed, also by the models that lie between it and the one that asks."""
    unhook(encoder)
    setattr(encoder, _CLOSED, True)


def is_open(module: nn.Module) -> bool:
    """Return whether a module is an encoder that `hook` may be called for."""
    return is_encoder(module) and not is_hooked(module) and not getattr(module, _CLOSED, False)


def hook(encoder: nn.Module) -> None:
    """Let the encoder's padded batches be packed."""
    add_hooks(encoder, _pack, _unpack)


def is_hooked(module: nn.Module) -> bool:
    """Return whether `hook` has been called."""
    return has_hook(module, _pack)


def unhook(encoder: nn.Module) -> None:
    """Undo `hook`."""
    remove_hooks(encoder, _pack, _unpack)
