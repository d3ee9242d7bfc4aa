"""A variational autoencoder of texts: Bowman et al. 2016 (arXiv:1511.06349), with today's transformers on both sides.

    text -> bidirectional encoder -> mean of its tokens -> (mu, logvar) -> z -> autoregressive decoder -> text

The decoder is told z in two ways, after Optimus (Li et al. 2020, arXiv:2004.04092): in each layer as a key and value in front
of those of the tokens ("memory"), and added to the embedding of each token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    Cache,
    DynamicCache,
    EuroBertConfig,
    EuroBertModel,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from ...nn import GaussianLatent
from ...ops.latent import gaussian_kl

IGNORED = -100  # a label that is not predicted
FIRST_LOGVAR = -3.0  # of the posterior: a decoder that at first hears nothing but noise learns not to listen


_BERT_BASE = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_BERT_BASE |= {"num_attention_heads": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class TextVAEConfig(PreTrainedConfig):
    """What a `TextVAE` is made of: two configs of transformers, and the latent between them.

    Args:
        encoder: of a EuroBERT, a bidirectional Llama.
        decoder: of a Llama, of the same vocabulary and hidden size; its embeddings are the encoder's too.
        latent_dim: size D of the latent.
        free_bits: nats that each dimension of the latent may take for nothing (Kingma et al. 2016): what keeps the decoder from
            learning to do without it.
    """

    model_type = "fastlm_text_vae"
    sub_configs_defaults = {  # their own defaults do not fit each other
        "encoder": SubConfigSpec(config_class=EuroBertConfig, model_type="eurobert", init_kwargs=_BERT_BASE),
        "decoder": SubConfigSpec(config_class=LlamaConfig, model_type="llama", init_kwargs=_BERT_BASE),
    }

    encoder: PreTrainedConfig | dict | None = None
    decoder: PreTrainedConfig | dict | None = None
    latent_dim: int = 32
    free_bits: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size"):
            ours, theirs = getattr(self.encoder, name), getattr(self.decoder, name)
            if ours != theirs:
                raise ValueError(f"encoder and decoder must have the same {name}; got {ours} and {theirs}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self, name, getattr(self.decoder, name))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The config that generation asks about: the decoder's."""
        return self.decoder


@dataclass
class TextVAEOutput(ModelOutput):
    """
    Args:
        loss: 0-d, in nats per label: reconstruction and weighted KL; where labels are given.
        logits: (B, L, vocabulary).
        reconstruction: (B,), in nats: -log p(text | z); where labels are given.
        kl: (B,), in nats: of the posterior from N(0, 1), without free bits; where a text was encoded.
        cache: of the decoder.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    reconstruction: Tensor | None = None
    kl: Tensor | None = None
    cache: Cache | None = None


class TextVAE(PreTrainedModel, GenerationMixin):
    """See the top of the file. ``generate(ids, latents=z)`` writes on from ``ids`` (B, L) as z (B, D) wants it.

    ``kl_weight`` is the beta of the loss; training changes it from step to step. In evaluation the loss is the negative ELBO.
    """

    config_class = TextVAEConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _tied_weights_keys = {
        "decoder.lm_head.weight": "decoder.model.embed_tokens.weight",
        "encoder.embed_tokens.weight": "decoder.model.embed_tokens.weight",
    }

    def __init__(self, config: TextVAEConfig):
        super().__init__(config)
        decoder = config.decoder
        self.encoder = EuroBertModel._from_config(config.encoder)
        self.decoder = LlamaForCausalLM._from_config(decoder)
        self.latent = GaussianLatent(config.encoder.hidden_size, config.latent_dim, free_bits=config.free_bits)
        # one key and one value for each head of each layer, as in a cache
        slots = decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
        self.to_keys = nn.Linear(config.latent_dim, slots)
        self.to_values = nn.Linear(config.latent_dim, slots)
        self.to_embedding = nn.Linear(config.latent_dim, decoder.hidden_size)
        self.kl_weight = 1.0
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "to_embedding", None):
            init.zeros_(module.weight)  # else a latent that says nothing yet drowns the embeddings
        if module is getattr(getattr(self, "latent", None), "linear", None):
            init.constant_(module.bias[self.config.latent_dim :], FIRST_LOGVAR)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def encode(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, hidden): the mean of the encoder's outputs over the tokens of ``ids`` (B, L), padding left out."""
        hidden = self.encoder(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        if attention_mask is None:
            return hidden.mean(1)
        weights = attention_mask.to(hidden.dtype)
        return torch.einsum("bld,bl->bd", hidden, weights) / weights.sum(1, keepdim=True).clamp(min=1)

    def posterior(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (B, D), of the texts ``ids`` (B, L)."""
        return self.latent.parameters_of(self.encode(ids, attention_mask))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        latents: Tensor | None = None,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        seeds: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> TextVAEOutput:
        """Decode ``input_ids`` with ``latents``, or with one drawn from the posterior of ``encoder_input_ids``.

        Args:
            input_ids: (B, L), what the decoder reads.
            attention_mask, encoder_attention_mask: (B, L), 1 at tokens, 0 at padding. A decoder whose padding is on the right
                needs none.
            cache: of the tokens before ``input_ids``, and of z.
            latents: (B, D).
            labels: (B, L): tokens to predict, the next one of each place being the one that counts; -100 for none.
            seeds: (B,) int64, of each text's noise.
            logits_to_keep: of how many last tokens logits are wanted; 0 for all.
            num_items_in_batch: labels of the whole batch, of which this is a part; the loss is divided by it.
        """
        kl = loss = reconstruction = free_kl = None
        if latents is None:
            if encoder_input_ids is None:
                raise ValueError("TextVAE needs latents, or encoder_input_ids to draw them from")
            mu, logvar = self.posterior(encoder_input_ids, encoder_attention_mask)
            latents, free_kl = self.latent.sample(mu, logvar, seed=seeds)
            kl = gaussian_kl(mu.detach(), logvar.detach()) if self.config.free_bits else free_kl.detach()
        logits, cache = self._decode(input_ids, attention_mask, position_ids, cache, latents, logits_to_keep, **kwargs)
        if labels is not None:
            reconstruction = nll_of(logits, labels)
            loss = reconstruction.sum()
            if free_kl is not None:
                loss = loss + (self.kl_weight * free_kl if self.training else kl).sum()
            loss = loss / ((labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
            reconstruction = reconstruction.detach()
        return TextVAEOutput(loss, logits, reconstruction, kl, cache)

    def _decode(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        latents: Tensor,
        logits_to_keep: int,
        **kwargs,
    ) -> tuple[Tensor, Cache]:
        """(logits, cache). The cache has z at its place 0, which is no token's place: those count from 0 without it."""
        cache = DynamicCache(config=self.config.decoder) if cache is None else cache
        if not cache.get_seq_length():
            self._remember(cache, latents)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (1, 0), value=1)
        if position_ids is None:
            seen = cache.get_seq_length() - 1
            position_ids = torch.arange(seen, seen + ids.shape[1], device=ids.device).unsqueeze(0)
        embeddings = self.get_input_embeddings()(ids) + self.to_embedding(latents).unsqueeze(1)
        outputs = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return outputs.logits, outputs.cache

    def _remember(self, cache: Cache, latents: Tensor) -> None:
        """Put z (B, D) into an empty cache, as a key and a value of each layer."""
        config = self.config.decoder
        shape = (latents.shape[0], config.num_hidden_layers, config.num_key_value_heads, 1, config.head_dim)
        keys, values = (project(latents).view(shape).unbind(1) for project in (self.to_keys, self.to_values))
        for layer, (key, value) in enumerate(zip(keys, values)):
            cache.update(key, value, layer)


def nll_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): -log p of each row of labels (B, L) by the logits (B, L, vocabulary) of the places before."""
    predicted = logits[:, :-1].transpose(1, 2).float()
    return F.cross_entropy(predicted, labels[:, 1:], reduction="none", ignore_index=IGNORED).sum(1)


AutoConfig.register(TextVAEConfig.model_type, TextVAEConfig)
AutoModel.register(TextVAEConfig, TextVAE)
