"""The masks of transformers' models on fastlm, which are not built if an argument of `fastlm.attention` replaces them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from ...distributed import context
from .packing import padding_mask
from .sequences import causal_bounds
from .traits import takes_any_mask

# A mask that is only a pattern is never built. transformers gets a stand-in instead, and hands it on to the attention: one
# number on the CPU, expanded to the mask's shape (batch, 1, queries, keys), of a dtype that no mask has.
CAUSAL = torch.uint16  # a query sees the keys up to its own position, counted from the last query and key; the number is unused
WINDOW = torch.uint32  # of those keys a query sees only the last ones, as many as the number
WINDOW_ON_BOTH_SIDES = torch.uint64  # a query sees its own position, and as many keys on each side as the number
STAND_INS = (CAUSAL, WINDOW, WINDOW_ON_BOTH_SIDES)

_PATTERN = "fastlm_pattern"  # the attribute of padding in context_parallel that has the stand-in which holds beside it, or None
_NO_PATTERN = "context_parallel has causal, windowed and padding masks; the model makes another, as for packed sequences"


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: PreTrainedConfig | None = None,
    **kwargs,
) -> Tensor | None:
    """Make the mask that a model of transformers hands to its attentions; the arguments are those of ``sdpa_mask``.

    Returns:
        None if all queries see all keys; a stand-in (see above) for a causal or windowed mask without padding; the bounds of
        packed sequences (`sequences.PACKED`), if a batch of one has them; otherwise a bool mask (batch, 1, queries, keys),
        True: attend, which takes (batch, keys) of memory if all queries see the same keys.
        Models that must not get such masks get eager's float masks. In `fastlm.distributed.context_parallel` the keys of the
        mask are those of all ranks.

    Raises:
        NotImplementedError: in that context, for a mask that is neither a pattern nor padding, or for a model that changes it.
    """
    shape = (batch_size, 1, q_length, kv_length)
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length  # the last query is at the last key
    if context.is_open():
        if not (may_skip and aligned and (config is None or takes_any_mask(type(config)))):
            raise NotImplementedError(_NO_PATTERN)
        tokens = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
        return _mask_of_part(mask_function, tokens, shape)
    if config is not None and not takes_any_mask(type(config)):
        skip = {"allow_is_bidirectional_skip": allow_is_bidirectional_skip}
        rest = {"mask_function": mask_function, "attention_mask": attention_mask, "config": config, **skip, **kwargs}
        return eager_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **rest)
    if batch_size == 1 and aligned and (bounds := _bounds(mask_function)) is not None:
        return bounds
    stand_in = _stand_in(mask_function) if may_skip and aligned else None
    if stand_in is not None and q_length == 1 and (stand_in.dtype is CAUSAL or stand_in.item() >= kv_length):
        mask_function = bidirectional_mask_function  # the window of a query at the last key has all keys
    if may_skip and mask_function is bidirectional_mask_function:
        padding = _padding(attention_mask, kv_length, kv_offset)
        return None if padding is None else padding_mask(padding, shape)
    if stand_in is not None and _padding(attention_mask, kv_length, kv_offset) is None:
        return stand_in.expand(shape)
    rest = {"mask_function": mask_function, "attention_mask": attention_mask, "allow_is_causal_skip": False, **kwargs}
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **rest)


def _mask_of_part(mask_function: Callable, tokens: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Make the mask of this rank's queries over the keys of all ranks.

    Args:
        tokens: bool (batch, keys), True at a token, of this rank's keys; None on all ranks if there is no padding.
        shape: (batch, 1, queries, keys), of this rank.

    Returns:
        None or a stand-in, as `make_mask`; with padding on any rank a bool mask (batch, 1, 1, all keys), which has the stand-in
        as an attribute.
    """
    pattern = None
    if mask_function is not bidirectional_mask_function:
        pattern = _stand_in(mask_function)
        if pattern is None:
            raise NotImplementedError(_NO_PATTERN)
        pattern = pattern.expand(shape)
    tokens = None if tokens is None else context.side_by_side(tokens)
    if tokens is None or tokens.all():
        return pattern
    mask = tokens[:, None, None]
    setattr(mask, _PATTERN, pattern)
    return mask


def _padding(mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Return the keys' part (batch, keys) of transformers' bool padding mask, True: a token, or None without padding.

    A graph that is being compiled cannot read the mask's values, so there may always be padding.
    """
    if mask is None:
        return None
    mask = mask[:, kv_offset : kv_offset + kv_length]
    if (missing := kv_length - mask.shape[1]) > 0:  # a static cache has room for keys to come
        return nn.functional.pad(mask, (0, missing))
    return mask if torch.compiler.is_compiling() or not mask.all() else None


_AND = and_masks(causal_mask_function).__code__
_LEFT, _BOTH = sliding_window_overlay(1).__code__, sliding_window_bidirectional_overlay(1).__code__


def _stand_in(mask_function: Callable) -> Tensor | None:
    """Return the 0-d stand-in for one of transformers' patterns, or None for any other function."""
    if mask_function is causal_mask_function:
        return torch.zeros((), dtype=CAUSAL, device="cpu")
    if torch.compiler.is_compiling() or getattr(mask_function, "__code__", None) is not _AND:
        return None  # a graph cannot read the number
    overlay, *rest = mask_function.__closure__[0].cell_contents
    code = getattr(overlay, "__code__", None)
    if code is _LEFT and rest == [causal_mask_function]:
        return torch.tensor(overlay.__closure__[0].cell_contents, dtype=WINDOW, device="cpu")
    if code is _BOTH and rest == [bidirectional_mask_function]:
        return torch.tensor(overlay.__closure__[0].cell_contents, dtype=WINDOW_ON_BOTH_SIDES, device="cpu")
    return None


_OWN_SEQUENCE = packed_sequence_mask_function(None).__code__
_REMAP = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # since transformers 5.23
_OWN_POSITION = _REMAP and _REMAP(causal_mask_function, None).__code__


def _bounds(mask_function: Callable) -> Tensor | None:
    """Return the bounds of packed sequences for transformers' causal or windowed mask within them, or None for another."""
    if torch.compiler.is_compiling() or getattr(mask_function, "__code__", None) is not _AND:
        return None  # The number of sequences is not the graph's.
    within, *rest = mask_function.__closure__[0].cell_contents
    own = rest[0] if len(rest) == 1 else None
    if getattr(own, "__code__", None) is not _OWN_SEQUENCE:
        return None
    if _REMAP and getattr(within, "__code__", None) is _OWN_POSITION:
        within = _captured(within)["mask_function"]  # Within a sequence, positions go up by one as tokens do.
    pattern = _stand_in(within)
    if pattern is None or pattern.dtype is WINDOW_ON_BOTH_SIDES:
        return None
    window = None if pattern.dtype is CAUSAL else pattern.item()
    return causal_bounds(_captured(own)["packed_sequence_mask"][0], window)


def _captured(function: Callable) -> dict:
    """Return the values that a function's closure holds, by their names."""
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))


def read_mask(mask: Tensor | None) -> tuple[bool, tuple[int, int | None] | None, Tensor | None]:
    """Return (causal, window, mask) of a mask of `make_mask`, or of a user's own, as `fastlm.attention` takes them.

    Raises:
        NotImplementedError: a mask of `_mask_of_part` has lost what it stands for.
    """
    if mask is None:
        return False, None, None
    if mask.dtype in STAND_INS:
        return *read_stand_in(mask), None
    if not context.is_open() or mask.shape[-2] != 1:
        return False, None, mask
    if not hasattr(mask, _PATTERN):
        message = "a mask was copied on its way to the attention, and context_parallel cannot tell whether it is causal"
        raise NotImplementedError(f"{message}; a mask of your own needs a row for each query")
    pattern = getattr(mask, _PATTERN)
    return (False, None, mask) if pattern is None else (*read_stand_in(pattern), mask)


def read_stand_in(mask: Tensor) -> tuple[bool, tuple[int, int | None] | None]:
    """Return (causal, window) of a stand-in, as `fastlm.attention` takes them."""
    if mask.dtype is CAUSAL:
        return True, None
    number = mask[0, 0, 0, 0].item() if mask.numel() else 1
    return (True, (number - 1, None)) if mask.dtype is WINDOW else (False, (number, number))


def as_eager_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the float mask that an eager function takes, for a mask of `make_mask` or a user's own."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype in STAND_INS:
        causal, window = read_stand_in(mask)
        queries, keys = query.shape[2], key.shape[2]
        distance = torch.arange(keys, device=query.device) - torch.arange(keys - queries, keys, device=query.device)[:, None]
        mask = distance <= (0 if causal else window[1])
        mask = mask if window is None else mask & (distance >= -window[0])
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)
