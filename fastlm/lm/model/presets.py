"""New models to train, by name: a plain decoder, or a `TextVAE` around the same decoder."""

import torch
from transformers import EuroBertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import fastlm.integrations.transformers  # noqa: F401  registers attn_implementation="fastlm"

from ...nn.replace import replace
from .sizes import KINDS, PRESETS, Preset
from .text_vae import TextVAE, TextVAEConfig

ATTENTION = "fastlm"


def _common_options(size: Preset, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return the options that the configs of decoder and encoder share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.max_tokens,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def decoder_config(size: Preset, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Return the config of a decoder of this size, alone or in a `TextVAE`."""
    own = {"num_hidden_layers": size.layers, "num_key_value_heads": size.kv_heads}
    return LlamaConfig(**_common_options(size, tokenizer), **own)


def build(
    kind: str,
    preset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    free_bits: float = 0.0,
    mean_std: float = 0.0,
    seed: int = 0,
) -> PreTrainedModel:
    """Build a model with new weights for the tokenizer's vocabulary, on fastlm's kernels; a seed determines the weights.

    Raises:
        ValueError: there is no such kind or preset.
    """
    if kind not in KINDS:
        raise ValueError(f"model must be one of {', '.join(KINDS)}; got {kind!r}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    size = PRESETS[preset]
    decoder = decoder_config(size, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "decoder":
            return on_kernels(LlamaForCausalLM._from_config(decoder, attn_implementation=ATTENTION))
        own = {"num_hidden_layers": size.encoder_layers, "mask_token_id": tokenizer.mask_token_id}
        encoder = EuroBertConfig(**_common_options(size, tokenizer) | {"tie_word_embeddings": False}, **own)
        latent = {"latent_dim": size.latent_dim, "free_bits": free_bits, "mean_std": mean_std}
        config = TextVAEConfig(encoder=encoder, decoder=decoder, **latent)
        return on_kernels(TextVAE._from_config(config, attn_implementation=ATTENTION))


def on_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model after swapping what it has beside its attention: linear layers, and caches that grow in place."""
    replace(model)
    return model
