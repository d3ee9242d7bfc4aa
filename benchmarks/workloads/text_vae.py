"""Build fastlm's own TextVAE for the table of models: on torch's layers with its latent written out, and as it is.

It has random weights and the "small" preset, as `fastlm lm train` makes it on the default corpus.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from suite.rows import Step
from torch import Tensor, nn

import fastlm
from workloads.peers import eager_latent

VOCABULARY = 4096


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


def _texts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return ids (B, L) that begin with <|bos|>, and their mask. Texts of a batch have nine tenths of L tokens and more."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (batch, length), generator=generator)
    ids[:, 0] = _Vocabulary.bos_token_id
    mask = (torch.arange(length) < torch.linspace(0.9 * length, length, batch)[:, None]).long()
    return ids, mask


def text_gradients(model: nn.Module, batch: int, length: int) -> Step:
    """Run forward, backward and a step of AdamW. Return the logits and the embeddings' gradient."""
    model.train()
    ids, mask = _texts(batch, length)
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "labels": labels, "encoder_input_ids": ids, "encoder_attention_mask": mask}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> tuple[Tensor, ...]:
        outputs = model(**inputs)
        outputs.loss.backward()
        optimizer.step()
        results = outputs.logits.detach(), next(model.parameters()).grad
        model.zero_grad(set_to_none=True)
        return results

    return step


def noiseless_gradients(model: nn.Module, batch: int, length: int) -> Step:
    """Run the same with the posterior's mean for z, and without the step of AdamW."""
    model.train()
    ids, mask = _texts(batch, length)
    labels = ids.masked_fill(mask == 0, -100)

    def step() -> tuple[Tensor, ...]:
        mu, _ = model.posterior(ids, mask)
        outputs = model(input_ids=ids, labels=labels, latents=mu)
        outputs.loss.backward()
        return outputs.logits.detach(), next(model.parameters()).grad

    return step


def text_generation(model: nn.Module, batch: int, new_tokens: int) -> Step:
    """Generate so many tokens from latents, the likeliest each time. Return the logits that each was chosen by."""
    weights = model.to_embedding.weight
    latents = torch.randn(batch, weights.shape[1], generator=torch.Generator().manual_seed(1)).to(weights.dtype)
    ids = torch.full((batch, 1), _Vocabulary.bos_token_id)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    return lambda: (torch.stack(model.generate(ids, latents=latents, **options).logits),)
