"""Where a model looks: the attention weights of each head on one sentence, and their entropy."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.text_vae import TextVAE

LATENT = "z"  # the label of the key that is the latent
_SEEN = str.maketrans({" ": "·", "\n": "↵", "\r": "↵", "\t": "⇥"})


@dataclass(frozen=True)
class Attention:
    """The attention of a stack of layers on one sentence.

    Attributes:
        stack: "decoder" or "encoder".
        queries, keys: the labels of the Lq tokens that look and of the Lk places that they look at. The keys of a `TextVAE`'s
            decoder begin with its latent's.
        weights: (layers, heads, Lq, Lk) float32, rows of sum 1; 0 where a token may not look.
        visible: (Lq,) int64: how many keys a token may look at.
    """

    stack: str
    queries: list[str]
    keys: list[str]
    weights: Tensor
    visible: Tensor

    @property
    def entropy(self) -> Tensor:
        """(layers, heads), in nats: of each head, averaged over its queries."""
        return entropy(self.weights).mean(-1)

    @property
    def uniform(self) -> float:
        """The entropy, in nats, of a head that looks at all visible keys alike: the highest there is."""
        return float(self.visible.log().mean())

    @property
    def breadth(self) -> Tensor:
        """(layers, heads): the entropy as a share of the highest, from 0, one key for each query, to 1, all keys alike."""
        return self.entropy / self.uniform


def entropy(weights: Tensor) -> Tensor:
    """(*), in nats: of each row of ``weights`` (*, Lk)."""
    return torch.special.entr(weights).sum(-1)


@torch.inference_mode()
def attention_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[Attention]:
    """The attention of a model's decoder, and of a `TextVAE`'s encoder, on a text.

    The decoder reads all tokens but the last, whose attention predicts nothing; a `TextVAE`'s has the mean of the text's
    posterior as its latent.

    Args:
        model: with attn_implementation "eager", the only one that tells its weights.
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
    """A list that gets the attention weights (B, heads, Lq, Lk) of each call of the modules in the block, in float32."""
    weights = []
    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_hook(lambda module, inputs, outputs: weights.append(outputs[1].float()))
            hooks.callback(handle.remove)
        yield weights


def token_labels(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, with white space made visible; bytes that are but a part of a character are U+FFFD."""
    return [tokenizer.decode([number]).translate(_SEEN) for number in ids]
