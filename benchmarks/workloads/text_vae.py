"""Build fastlm's own TextVAE for the table of models: on torch's layers with its latent written out, and as it is.

It has random weights and the "small" preset, as `fastlm lm train` makes it on the default corpus.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from suite.rows import Step
from torch import Tensor, nn

import fastlm
from workloads.peers import eager_latent

VOCABULARY = 4096
SHORTEST = 10  # tokens


class _Vocabulary:
    """A stand-in for the tokenizer, with what a model asks of it."""

    pad_token_id, bos_token_id, eos_token_id, mask_token_id = range(4)

    def __len__(self) -> int:
        return VOCABULARY


def text_vae() -> nn.Module:
    from fastlm.lm.model.presets import build

    model = build("vae", "small", _Vocabulary()).eval()
    fastlm.restore(model)
    model.set_attn_implementation("sdpa")
    model.latent.sample = eager_latent
    return model


def on_kernels(model: nn.Module) -> type[AbstractContextManager]:
    """Put the model back on fastlm's kernels, as `build` makes it."""
    del model.latent.sample  # The module's own is behind it.
    model.set_attn_implementation("fastlm")
    fastlm.replace(model)
    return nullcontext


def _batch(model: nn.Module, batch: int, longest: int) -> dict[str, Tensor]:
    """Make a batch of texts as training does on fastlm's kernels, packed; elsewhere the same texts are padded."""
    from fastlm.lm.data.batches import Collator

    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(4, VOCABULARY, (length,), generator=generator) for length in lengths_of(batch, longest)]
    collate = Collator(_Vocabulary(), packed=model.config._attn_implementation == "fastlm")
    return collate([(ids, seed) for seed, ids in enumerate(texts)])


def lengths_of(batch: int, longest: int) -> list[int]:
    """Return the lengths of a batch's texts in tokens: few are long, nearly as in the default corpus (10 to 320, mean 72)."""
    return torch.logspace(math.log10(SHORTEST), math.log10(longest), batch).round().int().tolist()


def text_gradients(model: nn.Module, batch: int, longest: int) -> Step:
    """Run forward, backward and a step of AdamW. Return each text's NLL and the embeddings' gradient."""
    model.train()
    inputs = _batch(model, batch, longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> tuple[Tensor, ...]:
        outputs = model(**inputs)
        outputs.loss.backward()
        optimizer.step()
        results = outputs.reconstruction, next(model.parameters()).grad
        model.zero_grad(set_to_none=True)
        return results

    return step


def noiseless_gradients(model: nn.Module, batch: int, longest: int) -> Step:
    """Run the same with the posterior's mean for z, and without the step of AdamW."""
    from fastlm.lm.model.packed import PackedTexts

    model.train()
    inputs = _batch(model, batch, longest)
    bounds = inputs.get("cu_seq_lens_q")
    texts = None if bounds is None else PackedTexts(bounds, inputs["input_ids"].shape[1])
    encoder = [inputs.pop(f"encoder_{name}", None) for name in ("input_ids", "attention_mask", "position_ids")]

    def step() -> tuple[Tensor, ...]:
        mu, _ = model.posterior(*encoder, texts)
        outputs = model(**inputs, latents=mu)
        outputs.loss.backward()
        return outputs.reconstruction, next(model.parameters()).grad

    return step


def text_generation(model: nn.Module, batch: int, new_tokens: int) -> Step:
    """Generate so many tokens from latents, the likeliest each time. Return the logits that each was chosen by."""
    weights = model.to_embedding.weight
    latents = torch.randn(batch, weights.shape[1], generator=torch.Generator().manual_seed(1)).to(weights.dtype)
    ids = torch.full((batch, 1), _Vocabulary.bos_token_id)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    return lambda: (torch.stack(model.generate(ids, latents=latents, **options).logits),)
