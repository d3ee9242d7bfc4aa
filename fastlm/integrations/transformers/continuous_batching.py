"""Continuous batching on fastlm: ``model.generate_batch``, and ``transformers serve --continuous-batching``.

A batch whose requests all decode is attended to in place: the kernel appends each request's new token to its pages, and reads
them through the block table. A batch that has prompts among its requests is attended to as packed sequences, whose keys
transformers has copied out of the pages; it does so for layers with a sliding window always, as their pages are a ring.

There is no public way for an implementation to take part. transformers admits "sdpa", "paged|eager" and names that have "flash"
in them, for which it imports flash_attn or a kernel of the hub, and decodes from pages on CUDA and XPU alone. So `admit` puts
functions of this module in the place of the two that decide it: they answer for the admitted functions, and ask transformers'
own for all others.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.generation.continuous_batching import cache, continuous_api, initialization
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from ...ops.attention import kvcache_attention, varlen_attention

ensure_decode_fast_path_is_available = initialization.ensure_decode_fast_path_is_available


def is_batched(given: dict) -> bool:
    """Return whether a call of the AttentionInterface, given these arguments, is that of a batch of requests."""
    return given.get("write_index") is not None


@torch.compiler.disable  # The pages of all layers are views of one tensor, whose writes a graph cannot tell apart.
def attend_batch(query: Tensor, key: Tensor, value: Tensor, given: dict, **options) -> Tensor:
    """Attend to the requests of a batch, each by itself. Tensors are (1, H, tokens, D), the output is (1, tokens, Hq, Dv).

    Args:
        given: transformers' arguments for the batch: cu_seq_lens_q and cu_seq_lens_k (requests + 1,), where each request's
            queries and keys begin, and sliding_window, how many keys a query sees. With a block_table (requests, most pages),
            each request has one token, which is appended to the layer's pages, k_cache and v_cache (pages, page, Hkv, D).
        options: scale, softcap and sinks, as `fastlm.attention` takes them.
    """
    window = given.get("sliding_window")
    options |= {"causal": True, "window": None if window is None else (window - 1, None)}
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, H, D)
    if given["block_table"] is None:
        # What pads a compiled batch is one request more.
        begins = pad(given["cu_seq_lens_q"], (0, 1), value=len(query)), pad(given["cu_seq_lens_k"], (0, 1), value=len(key))
        return varlen_attention(query, key, value, *begins, **options).unsqueeze(0)
    new = {"key": key.unsqueeze(2), "value": value.unsqueeze(2)}  # (requests, Hkv, 1, D)
    # Requests that pad a compiled batch have a length of -1 and no pages. They get the first one, which no other request has.
    new["block_table"] = given["block_table"].clamp(min=0)
    cached = (given["cu_seq_lens_k"].diff() - 1).clamp(min=0)
    out = kvcache_attention(query.unsqueeze(2), given["k_cache"], given["v_cache"], cached, **new, **options)
    return out.squeeze(2).unsqueeze(0)  # (requests, Hq, 1, Dv) -> (1, requests, Hq, Dv)


_admitted: set[Callable] = set()


def admit(function: Callable) -> None:
    """Let models whose attention is that function, under whatever name, batch continuously."""
    _admitted.add(function)
    for module in (cache, continuous_api, initialization):
        module.is_flash_attention_requested = _takes_packed_sequences
    initialization.ensure_decode_fast_path_is_available = _ensure_decode_fast_path_is_available


def _is_admitted(name: str | None) -> bool:
    return ALL_ATTENTION_FUNCTIONS.get(name) in _admitted


def _takes_packed_sequences(
    config: PreTrainedConfig | None = None,
    requested_attention_implementation: str | None = None,
    version: int | list[int] | None = None,
) -> bool:
    """Return whether an implementation takes packed sequences and no mask, in place of `is_flash_attention_requested`."""
    name = requested_attention_implementation if config is None else config._attn_implementation
    if version is None and _is_admitted(name):
        return True
    return is_flash_attention_requested(config, requested_attention_implementation, version)


def _ensure_decode_fast_path_is_available(config: PreTrainedConfig, cb_config, user_requested: bool) -> None:
    """Leave decoding from pages on for fastlm where all layers have block tables; it needs no CUDA."""
    allocators = (cache.ATTN_TYPE_TO_ALLOCATOR[kind] for kind in cache.group_layers_by_attn_type(config))
    if not _is_admitted(config._attn_implementation) or not all(a.supports_block_table for a in allocators):
        ensure_decode_fast_path_is_available(config, cb_config, user_requested)
