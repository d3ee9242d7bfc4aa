"""A variational autoencoder of texts: Bowman et al. 2016 (arXiv:1511.06349), with today's transformers on both sides.

    text -> bidirectional encoder -> mean of its tokens -> (mu, logvar) -> z -> autoregressive decoder -> text

mu is normalized and decorrelated over the batch, if the config says so (`fastlm.lm.model.batch_norm`), which keeps the decoder
from ignoring z, and the dimensions of z from being all alike.

The decoder receives z in two ways, after Optimus (Li et al. 2020, arXiv:2004.04092): each layer has a key and a value of z
before those of the tokens ("memory"), and a projection of z is added to the embedding of each token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
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

from ...distributed import context
from ...nn import GaussianLatent
from ...ops.latent import gaussian_kl
from .batch_norm import DecorrelatedBatchNorm
from .packed import PackedCache, PackedTexts

IGNORED = -100  # the label of a token that the loss ignores
# The posterior's logvar in a new model. With more noise at first, the decoder learns to ignore z.
FIRST_LOGVAR = -3.0

_BERT_BASE = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_BERT_BASE |= {"num_attention_heads": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class TextVAEConfig(PreTrainedConfig):
    """The config of a `TextVAE`: the configs of its encoder and decoder, and the latent between them.

    Args:
        encoder: the config of a EuroBERT, a bidirectional Llama.
        decoder: the config of a Llama with the same vocabulary and hidden size; encoder and decoder share the embeddings.
        latent_dim: the size D of the latent.
        free_bits: the nats of KL of each dimension of the latent that the loss does not count (Kingma et al. 2016). They keep
            the decoder from learning to ignore the latent.
        mean_std: the standard deviation of the posterior's means over the texts of a batch, in each dimension, without
            correlations (`DecorrelatedBatchNorm`); 0 leaves the means as the encoder makes them. Free bits alone can be spent
            on posteriors that are narrow and all alike.
    """

    model_type = "fastlm_text_vae"
    sub_configs_defaults = {  # the defaults of the two config classes do not fit each other
        "encoder": SubConfigSpec(config_class=EuroBertConfig, model_type="eurobert", init_kwargs=_BERT_BASE),
        "decoder": SubConfigSpec(config_class=LlamaConfig, model_type="llama", init_kwargs=_BERT_BASE),
    }

    encoder: PreTrainedConfig | dict | None = None
    decoder: PreTrainedConfig | dict | None = None
    latent_dim: int = 32
    free_bits: float = 0.0
    mean_std: float = 0.0
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
        """Return the config that generation reads: the decoder's."""
        return self.decoder


@dataclass
class TextVAEOutput(ModelOutput):
    """The output of a `TextVAE`.

    Args:
        loss: 0-d, in nats per label: the reconstruction and the weighted KL. None without labels.
        logits: (B, L, vocabulary).
        reconstruction: (B,), in nats: -log p(text | z). None without labels.
        kl: (B,), in nats: the KL of the posterior from N(0, 1), without free bits. None if latents were given.
        cache: the decoder's cache.

    In `fastlm.distributed.context_parallel` loss, reconstruction and kl are this rank's share: their sums over the ranks are
    those of the whole texts.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    reconstruction: Tensor | None = None
    kl: Tensor | None = None
    cache: Cache | None = None


class TextVAE(PreTrainedModel, GenerationMixin):
    """The model that the top of this file describes.

    ``kl_weight`` is the beta of the loss; training changes it from step to step. In evaluation the loss is the negative ELBO.

    In `fastlm.distributed.context_parallel` each rank has a part of every text: the encoder's mean is that of the whole text,
    all ranks draw the same z, and the first has z's keys and values.
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
        self.loss_type = "ForCausalLM"  # So the Trainer counts the labels that are predicted, all but the first of each row.
        decoder = config.decoder
        self.encoder = EuroBertModel._from_config(config.encoder)
        self.decoder = LlamaForCausalLM._from_config(decoder)
        self.latent = GaussianLatent(config.encoder.hidden_size, config.latent_dim, free_bits=config.free_bits)
        if config.mean_std:
            self.mean_norm = DecorrelatedBatchNorm(config.latent_dim, config.mean_std)
        # z has one key and one value for each head of each layer, as a token has in a cache.
        slots = decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
        self.to_keys = nn.Linear(config.latent_dim, slots)
        self.to_values = nn.Linear(config.latent_dim, slots)
        self.to_embedding = nn.Linear(config.latent_dim, decoder.hidden_size)
        self.kl_weight = 1.0
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "to_embedding", None):
            init.zeros_(module.weight)  # a new latent says nothing yet, and would drown the embeddings
        if module is getattr(getattr(self, "latent", None), "linear", None):
            init.constant_(module.bias[self.config.latent_dim :], FIRST_LOGVAR)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def encode(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        texts: PackedTexts | None = None,
    ) -> Tensor:
        """Return the mean (B, hidden) of the encoder's outputs over the tokens of each text, without padding."""
        bounds = {} if texts is None else {"cu_seq_lens_q": texts.bounds, "cu_seq_lens_k": texts.bounds}
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": position_ids}
        hidden = self.encoder(**inputs, **bounds).last_hidden_state
        if texts is not None:
            return texts.mean(hidden)
        weights = hidden.new_ones(ids.shape) if attention_mask is None else attention_mask.to(hidden.dtype)
        weighted = context.total(torch.einsum("bld,bl->bd", hidden, weights))
        return weighted / context.total(weights.sum(1, keepdim=True)).clamp(min=1)

    def posterior(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        texts: PackedTexts | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar), each (B, D), of the texts ``ids``, (B, L), or packed (1, tokens).

        In training mu is normalized over these texts.
        """
        mu, logvar = self.latent.parameters_of(self.encode(ids, attention_mask, position_ids, texts))
        if self.config.mean_std:
            # Without its bias, which the norm takes out again: Adam would make steps of a gradient that is rounding alone.
            mu = self.mean_norm(mu - self.latent.linear.bias[: self.config.latent_dim])
        return mu, logvar

    def generate(self, inputs: Tensor | None = None, *arguments, latents: Tensor | None = None, **options):
        """Generate as transformers does, given ``latents`` (B, D), or drawing them from the prior by torch's generator."""
        if latents is None:
            ids = options.get("input_ids") if inputs is None else inputs
            batch = 1 if ids is None else len(ids)
            latents = torch.randn(batch, self.config.latent_dim, device=self.device, dtype=self.dtype)
        return super().generate(inputs, *arguments, latents=latents, **options)

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
        encoder_position_ids: Tensor | None = None,
        shift_labels: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> TextVAEOutput:
        """Decode ``input_ids`` with ``latents``, or with latents drawn from the posterior of ``encoder_input_ids``.

        Args:
            input_ids: (B, L), the decoder's input.
            attention_mask, encoder_attention_mask: (B, L), 1 at tokens, 0 at padding. The decoder needs none if its padding is
                on the right.
            cache: the keys and values of z and of the tokens before ``input_ids``.
            latents: (B, D).
            labels: (B, L), target ids, shifted inside the model; -100 is ignored.
            seeds: (B,) int64, the seed of each text's noise.
            logits_to_keep: compute the logits of this many last tokens only; 0 for all.
            num_items_in_batch: the number of labels of the whole batch, of which this may be a part; it divides the loss.
            position_ids, encoder_position_ids: (B, L), needed in `fastlm.distributed.context_parallel`, where they count from
                the start of the whole text.
            shift_labels: (B, L), the labels of the next positions, needed beside ``labels`` in that context, where the next
                token may be another rank's.
            cu_seq_lens_q: int32 (B + 1,), the bounds of B texts that are packed: what is (B, L) above is (1, tokens), both
                position_ids, which begin anew with each text, are needed, and masks and a cache are not taken. The label of
                each text's first token is -100.

        Raises:
            ValueError: one of the inputs that are needed is missing, or texts are packed for an attention other than fastlm's.
        """
        texts = None
        if cu_seq_lens_q is not None:
            self._check_packed(attention_mask, encoder_attention_mask, cache)
            texts = PackedTexts(cu_seq_lens_q, input_ids.shape[1])
        if texts is not None or context.is_open():
            where = "in context_parallel" if texts is None else "beside cu_seq_lens_q"
            _check_beside("position_ids", position_ids, input_ids, where)
            _check_beside("encoder_position_ids", encoder_position_ids, encoder_input_ids, where)
        if context.is_open():
            _check_beside("shift_labels", shift_labels, labels, where)
        kl = loss = reconstruction = free_kl = None
        if latents is None:
            if encoder_input_ids is None:
                raise ValueError("TextVAE needs latents, or encoder_input_ids to draw them from")
            mu, logvar = self.posterior(encoder_input_ids, encoder_attention_mask, encoder_position_ids, texts)
            latents, free_kl = self.latent.sample(mu, logvar, seed=context.common_seed(seeds, mu))
            kl = gaussian_kl(mu.detach(), logvar.detach()) if self.config.free_bits else free_kl.detach()
            free_kl, kl = free_kl / context.size(), kl / context.size()
        logits, cache = self._decode(input_ids, attention_mask, position_ids, cache, latents, texts, logits_to_keep, **kwargs)
        if labels is not None:
            targets = targets_of(labels, shift_labels)
            reconstruction = nll_of(logits, targets, texts)
            loss = reconstruction.sum()
            if free_kl is not None:
                loss = loss + (self.kl_weight * free_kl if self.training else kl).sum()
            loss = loss / (context.total((targets != IGNORED).sum()) if num_items_in_batch is None else num_items_in_batch)
            reconstruction = reconstruction.detach()
        return TextVAEOutput(loss, logits, reconstruction, kl, cache)

    def _check_packed(self, *not_taken: Tensor | Cache | None) -> None:
        """Check that the model can run packed texts, and that nothing comes with them that they do not take."""
        if any(argument is not None for argument in not_taken):
            raise ValueError("cu_seq_lens_q takes no attention_mask, encoder_attention_mask or cache beside it")
        names = {config._attn_implementation for config in (self.encoder.config, self.decoder.config)}
        if names != {"fastlm"}:
            raise ValueError(f"cu_seq_lens_q needs attn_implementation='fastlm'; got {', '.join(sorted(map(str, names)))}")

    def _decode(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        latents: Tensor,
        texts: PackedTexts | None,
        logits_to_keep: int,
        **kwargs,
    ) -> tuple[Tensor, Cache | None]:
        """Return (logits, cache). z is entry 0 of the cache, but takes no position: the tokens' positions count from 0."""
        of_token = self.to_embedding(latents)  # (B, hidden)
        if texts is None:
            cache = DynamicCache(config=self.config.decoder) if cache is None else cache
            of_token = of_token.unsqueeze(1)
        else:
            cache, of_token = PackedCache(texts), texts.by_token(of_token)
            kwargs |= {"cu_seq_lens_q": texts.bounds, "cu_seq_lens_k": texts.bounds_with_first}
        if context.has_start() and not cache.get_seq_length():
            self.remember(cache, latents)
        if context.has_start() and attention_mask is not None:
            attention_mask = F.pad(attention_mask, (1, 0), value=1)
        if position_ids is None:
            seen = cache.get_seq_length() - 1
            position_ids = torch.arange(seen, seen + ids.shape[1], device=ids.device).unsqueeze(0)
        outputs = self.decoder(
            inputs_embeds=self.get_input_embeddings()(ids) + of_token,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return outputs.logits, outputs.cache if texts is None else None

    def remember(self, cache: Cache, latents: Tensor) -> None:
        """Put z (B, D) into an empty cache, as one key and one value per layer and head."""
        config = self.config.decoder
        shape = (latents.shape[0], config.num_hidden_layers, config.num_key_value_heads, 1, config.head_dim)
        keys, values = (project(latents).view(shape).unbind(1) for project in (self.to_keys, self.to_values))
        for layer, (key, value) in enumerate(zip(keys, values)):
            cache.update(key, value, layer)


def targets_of(labels: Tensor, shift_labels: Tensor | None = None) -> Tensor:
    """Return the target ids of the first positions: ``shift_labels`` (B, L), or without them (B, L - 1), of ``labels``."""
    return labels[:, 1:] if shift_labels is None else shift_labels


def nll_of(logits: Tensor, targets: Tensor, texts: PackedTexts | None = None) -> Tensor:
    """Return -log p (B,) of each row of targets (B, T) under the first T of the logits (B, L, vocabulary).

    Of packed ``texts``, whose targets are one row, return that of each text.
    """
    wanted = targets.new_full(logits.shape[:2], IGNORED)
    wanted[:, : targets.shape[1]] = targets  # The logits stay whole, as a part of them would be a copy.
    by_token = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none", ignore_index=IGNORED)
    by_token = by_token.view_as(wanted)
    return by_token.sum(1) if texts is None else texts.total(by_token)


def _check_beside(name: str, tensor: Tensor | None, part: Tensor | None, where: str) -> None:
    """Check that a part of a text, or packed texts, come with what is not to be seen from themselves."""
    if part is not None and tensor is None:
        raise ValueError(f"{name} must be given {where}; got None")


AutoConfig.register(TextVAEConfig.model_type, TextVAEConfig)
AutoModel.register(TextVAEConfig, TextVAE)
AutoModelForCausalLM.register(TextVAEConfig, TextVAE)
