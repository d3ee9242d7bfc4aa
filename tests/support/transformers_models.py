"""Build tiny models of transformers with weights that make attention matter, make inputs for them, and compare them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import transformers as hf
from support.oracle import rounding_of_delta
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

import fastlm
import fastlm.integrations.transformers
from fastlm.integrations.transformers import attention as transformers_attention
from fastlm.testing import GRADIENT_FACTOR, VALUE_FACTOR, assert_as_good_as_plain, ulp_of_largest, worst_error

VOCABULARY = 60
PAD, BOS, EOS = 0, 1, 2
LENGTH = 13
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout", "dropout_rate", "hidden_dropout_prob")
DROPOUTS += ("embd_pdrop", "resid_pdrop", "activation_dropout", "hidden_dropout", "encoder_layerdrop", "decoder_layerdrop")


@dataclass(frozen=True)
class Architecture:
    """Hold one of transformers' model classes, the options of a tiny model, and how many attentions each forward runs."""

    model: type[hf.PreTrainedModel]
    options: dict = field(default_factory=dict)
    attentions: int = 2
    encoder_decoder: bool = False

    def build(self, implementation: str = "eager", **options) -> hf.PreTrainedModel:
        """Build the model in eval mode, without dropout, with the same weights every time."""
        config = self.model.config_class(**TOKENS, **{**self.options, **options})
        for name in DROPOUTS:
            if name not in options and isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)
        torch.manual_seed(0)
        model = self.model._from_config(config, attn_implementation=implementation)
        model.set_experts_implementation("eager")  # No other knows float64.
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            spread = 1 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
            offset = 0.0 if parameter.dim() > 1 else parameter.detach()
            parameter.data = offset + spread * torch.randn(parameter.shape, generator=generator)
        return model.eval()


ARCHITECTURES = {
    "BERT": Architecture(hf.BertForMaskedLM, BERT),
    "GPT-2": Architecture(hf.GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "Llama": Architecture(hf.LlamaForCausalLM, LLAMA),
    "Qwen2 with a window": Architecture(
        hf.Qwen2ForCausalLM, {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    ),
    "Qwen3": Architecture(hf.Qwen3ForCausalLM, LLAMA),
    "Mistral": Architecture(hf.MistralForCausalLM, {**LLAMA, "sliding_window": 4}),
    "Gemma 2": Architecture(
        hf.Gemma2ForCausalLM, {**LLAMA, "sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    ),
    "Gemma 3": Architecture(
        hf.Gemma3ForCausalLM,
        {**LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    ),
    "GPT-OSS": Architecture(
        hf.GptOssForCausalLM,
        # The router takes every expert, so that no rounding chooses another.
        {**LLAMA, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 2, "rope_parameters": ROPE},
    ),
    "ModernBERT": Architecture(
        hf.ModernBertForMaskedLM, {**BERT, "local_attention": 6, "layer_types": ["full_attention", "sliding_attention"]}
    ),
    "T5": Architecture(
        hf.T5ForConditionalGeneration,
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": BOS},
        attentions=6,
        encoder_decoder=True,
    ),
    "Marian": Architecture(hf.MarianMTModel, BART, attentions=6, encoder_decoder=True),
    "BART": Architecture(hf.BartForConditionalGeneration, BART, attentions=6, encoder_decoder=True),
    "Whisper": Architecture(
        hf.WhisperForConditionalGeneration,
        {**BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32},
        attentions=6,
        encoder_decoder=True,
    ),
}


def inputs_of(model: nn.Module, padding: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Make a batch of three. With padding, the second of its sequences is 4 shorter, and the third has one token."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        for row, pads in ((1, 4), (2, LENGTH - 1)):
            mask[row, slice(0, pads) if padding == "left" else slice(-pads, None)] = 0
        ids = ids.masked_fill(mask == 0, PAD)
    encoder = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type == "whisper":
        return {
            "input_features": torch.randn(3, 8, 24, generator=generator).to(dtype),
            "decoder_input_ids": ids,
            "decoder_attention_mask": mask,
        }
    if model.config.is_encoder_decoder:
        decoder_ids = torch.randint(3, VOCABULARY, (3, LENGTH - 2), generator=generator)
        return encoder | {"decoder_input_ids": decoder_ids}
    return encoder


def valid_of(inputs: dict[str, Tensor]) -> Tensor:
    """Return which positions of the output belong to tokens, (batch, length). The others mean nothing."""
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"].bool()
    if "decoder_input_ids" in inputs:
        return torch.ones_like(inputs["decoder_input_ids"], dtype=torch.bool)
    return inputs["attention_mask"].bool()


@contextmanager
def golden_masks() -> Iterator[None]:
    """Make eager's masks hold float32's least number. Its softmax is float32, where float64's least number gives NaN."""

    def mask_of_float32(*args, dtype=torch.float32, **kwargs):
        mask = eager_mask(*args, dtype=torch.float32 if dtype == torch.float64 else dtype, **kwargs)
        return mask if mask is None else mask.to(dtype)

    hf.AttentionMaskInterface.register("eager", mask_of_float32)
    yield
    hf.AttentionMaskInterface.register("eager", eager_mask)


def results_of(model: nn.Module, inputs: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    """Return by name all logits (token logits at valid positions only) and the gradients of all parameters."""
    outputs = {name: logits for name, logits in model(**inputs).items() if "logits" in name}
    valid = valid_of(inputs)
    outputs = {name: logits[valid] if logits.shape[:2] == valid.shape else logits for name, logits in outputs.items()}
    results = {name: logits.detach() for name, logits in outputs.items()}
    if gradients:
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs.values()]
        model.zero_grad()
        torch.autograd.backward(list(outputs.values()), upstream)
        results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results


class RoundedOutput(torch.autograd.Function):
    """Map (out, lse) to out. Rounding it to a dtype with that epsilon shifts the scores' gradients (rounding_of_delta)."""

    @staticmethod
    def forward(ctx, out: Tensor, lse: Tensor, epsilon: float) -> Tensor:
        ctx.epsilon = epsilon
        ctx.save_for_backward(out)
        return out.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, rounding_of_delta(ctx.epsilon, *ctx.saved_tensors, gradient, 0), None


def nudged_results(model: nn.Module, inputs: dict[str, Tensor], gradients: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a float64 model's results with roundings that no implementation can avoid (tests/support/oracle.py).

    Its weights are off by an ulp of float32, and attention outputs are rounded to ``dtype`` before deltas are taken from them.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
        parameter.data = parameter * (1 + torch.finfo(torch.float32).eps * signs)
    model.set_attn_implementation("fastlm")  # Its float64 is the reference.

    def rounded(*args, **kwargs):
        return RoundedOutput.apply(*fastlm.attention(*args, return_lse=True, **kwargs), torch.finfo(dtype).eps)

    with mock.patch.object(transformers_attention, "attention", rounded):
        return results_of(model, inputs, gradients)


REPLACED = "replaced"  # as an implementation: fastlm.replace


def in_dtype(model: nn.Module, dtype: torch.dtype, implementation: str) -> nn.Module:
    """Return a copy of a model in that dtype and on that implementation."""
    model = copy.deepcopy(model).to(dtype)
    if implementation == REPLACED:
        fastlm.replace(model)
    else:
        model.set_attn_implementation(implementation)
    return model


def assert_as_good_as_eager(
    model: nn.Module, dtype: torch.dtype, padding: str | None, gradients: bool, implementation: str = "fastlm"
) -> None:
    """Hold fastlm's results on a model, its weights rounded to ``dtype``, to the rule of tests/support/oracle.py."""
    model = model.to(dtype)
    exact, plain, fast = (
        in_dtype(model, type_, name) for type_, name in ((torch.float64, "eager"), (dtype, "eager"), (dtype, implementation))
    )
    with golden_masks():
        golden, plain, actual = (results_of(run, inputs_of(run, padding), gradients) for run in (exact, plain, fast))
        nudged = nudged_results(exact, inputs_of(exact, padding), gradients, dtype)
    assert actual.keys() == plain.keys() == golden.keys() == nudged.keys()
    for what, result in actual.items():
        factor = VALUE_FACTOR if "logits" in what else GRADIENT_FACTOR
        ulp = max(ulp_of_largest(golden[what], dtype), ulp_of_largest(golden[what], torch.float32))
        slack = ulp + worst_error(nudged[what], golden[what])
        assert_as_good_as_plain(result, plain[what], golden[what], factor, what, slack)


def count_calls(monkeypatch) -> Callable[[], int]:
    """Return a function that tells how often fastlm's attention has run since, to prove that it ran."""
    calls, original = [], transformers_attention.attention

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(transformers_attention, "attention", counted)
    return lambda: len(calls)
