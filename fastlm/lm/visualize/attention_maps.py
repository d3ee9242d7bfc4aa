"""Attention maps: the attention weights of each head of a model on one sentence, and their entropy."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.text_vae import TextVAE

LATENT = "z"  # the label of the latent's key
_SEEN = str.maketrans({" ": "·", "\n": "↵", "\r": "↵", "\t": "⇥"})


@dataclass(frozen=True)
class Attention:
    """The attention of a stack of layers on one sentence.

    Attributes:
        stack: "decoder" or "encoder".
        queries, keys: the labels of the Lq queries and of the Lk keys. The first key of a `TextVAE`'s decoder is its latent's.
        weights: (layers, heads, Lq, Lk) float32. Each row sums to 1; the weight of a key that a query does not see is 0.
        visible: (Lq,) int64: the number of keys that each query sees.
    """

    stack: str
    queries: list[str]
    keys: list[str]
    weights: Tensor
    visible: Tensor

    @property
    def entropy(self) -> Tensor:
        """Return the entropy of each head in nats, averaged over its queries: (layers, heads)."""
        return entropy(self.weights).mean(-1)

    @property
    def uniform(self) -> float:
        """Return the highest possible entropy in nats, that of a head that weighs all visible keys alike."""
        return float(self.visible.log().mean())

    @property
    def breadth(self) -> Tensor:
        """Return the entropy as a share of the highest: (layers, heads), from 0 (one key per query) to 1 (all keys alike)."""
        return self.entropy / self.uniform


def entropy(weights: Tensor) -> Tensor:
    """Return the entropy (*) in nats of each row of ``weights`` (*, Lk)."""
    return torch.special.entr(weights).sum(-1)


@torch.inference_mode()
def attention_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[Attention]:
    """Return the attention of a model's decoder, and of a `TextVAE`'s encoder, on a text.

    The decoder reads all tokens but the last, whose attention predicts nothing. A `TextVAE`'s decoder gets the mean of the
    text's posterior as its latent.

    Args:
        model: a model with attn_implementation "eager", the only one that returns its weights.
        ids: (1, L) int64, L at least 3: the text between <|bos|> and <|eos|>.
    """
    labels = token_labels(ids[0].tolist(), tokenizer)
    read, shown = ids[:, :-1], labels[:-1]
    causal = torch.arange(1, len(shown) + 1)
    if not isinstance(model, TextVAE):
        with watched(layer.self_attn for layer in model.model.layers) as weights:
            model(input_ids=read)
        return [Attention("decoder", shown, shown, torch.cat(weights), causal)]
    with watched(layer.self_attn for layer in model.encoder.layers) as encoder_weights:
        mu, _ = model.posterior(ids)
    with watched(layer.self_attn for layer in model.decoder.model.layers) as weights:
        model(input_ids=read, latents=mu)
    return [
        Attention("decoder", shown, [LATENT, *shown], torch.cat(weights), causal + 1),
        Attention("encoder", labels, labels, torch.cat(encoder_weights), torch.full((len(labels),), len(labels))),
    ]


@contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the attention weights (B, heads, Lq, Lk) of each call of the modules in the block, in float32, in a list."""
    weights = []
    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_hook(lambda module, inputs, outputs: weights.append(outputs[1].float()))
            hooks.callback(handle.remove)
        yield weights


def token_labels(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token with visible white space; an incomplete character is U+FFFD."""
    return [tokenizer.decode([number]).translate(_SEEN) for number in ids]
