"""Caches of keys and values that grow in place, for ``generate``.

transformers' DynamicCache copies a layer's whole cache for each new token. After `fastlm.replace`, a forward pre-hook of the
model gives the layers of a DynamicCache another class, which keeps spare room behind the cached tokens and writes new ones
there. What it returns are views of that memory, which fastlm's attention reads as they are.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .hooks import add_hooks, has_hook, remove_hooks

_LEAST_ROOM = 256  # tokens; or an eighth of the cached ones, if that is more: so copies take 1 % of the bytes that are read


class InPlaceLayer(DynamicLayer):
    """A DynamicLayer that appends in place while no gradients are recorded: the same values, in views instead of copies.

    It does so only if its keys and values are the tensors that its last update made. After a crop, a reordering or an update
    of a copy of the layer, somebody may hold what lies behind them, and torch.cat makes new ones.
    """

    _memory: tuple[Tensor, Tensor] | None = None  # (B, H, capacity, D) and (B, H, capacity, Dv); what is cached is their start
    _last: tuple[Tensor, Tensor] | None = None  # the keys and values that the last update made

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys (B, H, L, D) and values (B, H, L, Dv), and return all that are cached."""
        if self._goes_on(key_states, value_states):
            begin = self.keys.shape[-2]
            end = begin + key_states.shape[-2]
            if self._memory is None or end > self._memory[0].shape[-2] or not _is_writable(self._memory[0]):
                self._memory = _with_room(self.keys, end), _with_room(self.values, end)
            for memory, states in zip(self._memory, (key_states, value_states), strict=True):
                memory[..., begin:end, :] = states
            self.keys, self.values = (memory[..., :end, :] for memory in self._memory)
        else:
            super().update(key_states, value_states, *args, **kwargs)
            self._memory = None
        self._last = None if _is_recorded() else (self.keys, self.values)
        return self.keys, self.values

    def _goes_on(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Tell whether an update may write behind the last one's keys and values."""
        if self._last is None or _is_recorded():
            return False
        keys, values = self._last
        if self.keys is not keys or self.values is not values:
            return False
        return _fits_behind(keys, key_states) and _fits_behind(values, value_states)

    def reset(self) -> None:
        """Forget everything, and free the memory."""
        self._memory = self._last = None
        super().reset()


def _is_recorded() -> bool:
    """Tell whether autograd, torch.compile or a tracer holds on to tensors, which must not be written then."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing()


def _fits_behind(cached: Tensor, new: Tensor) -> bool:
    """Tell whether ``new`` differs from what is cached in its length alone. torch.cat has more ways, and errors."""
    return (
        type(new) is Tensor
        and new.dtype is cached.dtype
        and new.device == cached.device
        and new.shape[:-2] == cached.shape[:-2]
        and new.shape[-1] == cached.shape[-1]
    )


def _is_writable(tensor: Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


def _with_room(cached: Tensor, length: int) -> Tensor:
    """Copy ``cached`` to the beginning of memory for ``length`` tokens and more."""
    memory = cached.new_empty((*cached.shape[:-2], length + max(_LEAST_ROOM, length // 8), cached.shape[-1]))
    memory[..., : cached.shape[-2], :] = cached
    return memory


# ---- how the caches of a model get such layers ------------------------------------------------------------------------------


def _grow_in_place(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Let the dynamic caches among a model's arguments grow in place: a forward pre-hook."""
    for value in kwargs.values():
        if isinstance(value, Cache):
            cache = getattr(value, "self_attention_cache", value)  # an EncoderDecoderCache's
            if type(cache) is DynamicCache and not cache.offloading:
                _convert(cache)


def _convert(cache: DynamicCache) -> None:
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = InPlaceLayer
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = InPlaceLayer


def hook(model: nn.Module) -> None:
    """Let the caches that the model is given grow in place."""
    add_hooks(model, _grow_in_place)


def is_hooked(model: nn.Module) -> bool:
    """Return whether `hook` has been called. A copy or a pickle of a model keeps its hooks."""
    return has_hook(model, _grow_in_place)


def unhook(model: nn.Module) -> None:
    """Undo `hook`. Caches that were made meanwhile stay what they are."""
    remove_hooks(model, _grow_in_place)
