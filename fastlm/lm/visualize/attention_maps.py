"""What each head of a model attends to in a text: entropy, where the weights go, and the largest weights of each token."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.text_vae import TextVAE
from .look import Look, looking, stacked

LATENT = "z"  # the label of the latent's key
_SEEN = str.maketrans({" ": "·", "\n": "↵", "\r": "↵", "\t": "⇥"})


@dataclass(frozen=True)
class Attention:
    """The attention of a stack of layers on one text.

    Attributes:
        stack: "decoder" or "encoder".
        queries, keys: the labels of the Lq queries and of the Lk keys. The first key of a `TextVAE`'s decoder is its latent's.
        visible: (Lq,) int64: the number of keys that each query sees.
        look: what was seen of the layers.
    """

    stack: str
    queries: list[str]
    keys: list[str]
    visible: Tensor
    look: Look

    @property
    def entropy(self) -> Tensor:
        """Return the entropy of each head in nats, averaged over its queries: (layers, heads)."""
        return self.look.entropy.mean(-1)

    @property
    def uniform(self) -> float:
        """Return the highest possible entropy in nats, that of a head that weighs all visible keys alike."""
        return float(self.visible.log().mean())

    @property
    def breadth(self) -> Tensor:
        """Return the entropy as a share of the highest: (layers, heads), from 0 (one key per query) to 1 (all keys alike)."""
        return self.entropy / self.uniform

    @property
    def shares(self) -> Tensor:
        """Return the share of a head's weights that goes to each key: (layers, heads, Lk). Those of a head sum to 1."""
        return self.look.key_mass / len(self.queries)

    @property
    def before(self) -> int:
        """Return the number of keys before those of the tokens: 1 with a latent, otherwise 0."""
        return len(self.keys) - len(self.queries)


@torch.inference_mode()
def attention_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[Attention]:
    """Return the attention of a model's decoder, and of a `TextVAE`'s encoder, on a text.

    The decoder reads all tokens but the last, whose attention predicts nothing. A `TextVAE`'s decoder gets the mean of the
    text's posterior as its latent.

    Args:
        ids: (1, L) int64, L at least 3: the text between <|bos|> and <|eos|>.
    """
    labels = token_labels(ids[0].tolist(), tokenizer)
    read, shown = {"input_ids": ids[:, :-1], "logits_to_keep": 1}, labels[:-1]
    causal = torch.arange(1, len(shown) + 1)
    if not isinstance(model, TextVAE):
        with looking(model) as seen:
            model(**read)
        return [Attention("decoder", shown, shown, causal, stacked(seen))]
    with looking(model) as encoder_seen:
        mu, _ = model.posterior(ids)
    with looking(model) as seen:
        model(latents=mu, **read)
    return [
        Attention("decoder", shown, [LATENT, *shown], causal + 1, stacked(seen)),
        Attention("encoder", labels, labels, torch.full((len(labels),), len(labels)), stacked(encoder_seen)),
    ]


def token_labels(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token with visible white space; an incomplete character is U+FFFD."""
    return [tokenizer.decode([number]).translate(_SEEN) for number in ids]
