"""ONNX files of a trained model, for ONNX Runtime and other programs without Python or torch.

decoder.onnx (of a `TextVAE`, and of a decoder alone), which writes a text token by token:

    input_ids (B, L), attention_mask (B, P + L), past_key_values.N.key and .value (B, heads, P, head size), latents (B, D)
    -> logits (B, L, vocabulary), present.N.key and .value (B, heads, P + L, head size)

N counts the layers, P the tokens of earlier calls, 0 at first; only a `TextVAE` has ``latents``. The names are those that
transformers.js and Optimum give to a decoder. encoder.onnx, of a `TextVAE` alone:

    input_ids (B, L), attention_mask (B, L) -> mu (B, D), logvar (B, D)
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from ...nn.replace import restore
from ..data.batches import encode_text
from ..data.tokenizer import FILE as TOKENIZER
from ..extras import require
from ..files import replaced_together
from .checkpoint import CONFIG, load
from .text_vae import TextVAE

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
FILES = (ENCODER, DECODER, f"{DECODER}.data", TOKENIZER, CONFIG)  # weights of 2 GiB and more are beside their graph
CHECKED = "The"  # the text that model and files go on from
MOST_CHECKED = 32  # tokens


@dataclass
class Export:
    """The files that were written, and the number of tokens that ONNX Runtime wrote with them, the same as the model."""

    files: list[Path]
    tokens: int

    def __str__(self) -> str:
        sizes = [f"{file.name:16}{file.stat().st_size / 2**20:8.2f} MiB" for file in self.files]
        return "\n".join([*sizes, f"ONNX Runtime goes on from {CHECKED!r} with the same {self.tokens} tokens as the model."])


def export(checkpoint: str | os.PathLike, output: str | os.PathLike) -> Export:
    """Write a checkpoint's decoder and encoder as ONNX, with tokenizer.json and config.json, and check them by ONNX Runtime.

    Raises:
        ImportError: ONNX's libraries are missing.
        ValueError, FileNotFoundError: as `fastlm.lm.model.checkpoint.load`; or ``output`` is a file.
        RuntimeError: ONNX Runtime writes other tokens than the model; ``output`` is unchanged.
        OSError: the disk is full; ``output`` is unchanged.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    model, tokenizer = load(checkpoint)
    with replaced_together(Path(output), FILES) as folder:
        expected = written_by_model(model, tokenizer)
        restore(model)
        model.set_attn_implementation("eager")
        write_graphs(model, folder)
        found = written_by_onnx(folder, tokenizer, len(expected))
        if found != expected:
            raise RuntimeError(f"ONNX Runtime goes on from {CHECKED!r} with the tokens {found}, and the model with {expected}")
        tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
        model.config.to_json_file(folder / CONFIG)
    return Export([path for name in FILES if (path := Path(output) / name).exists()], len(expected))


# ---- the check --------------------------------------------------------------------------------------------------------------


def _checked(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return encode_text(CHECKED, tokenizer, MOST_CHECKED)


@torch.inference_mode()
def written_by_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the likeliest tokens after CHECKED; a `TextVAE` has CHECKED's own latent."""
    ids = torch.tensor([_checked(tokenizer)])
    given = {"latents": model.posterior(ids)[0]} if isinstance(model, TextVAE) else {}
    prompt = ids[:, :-1]  # without <|eos|>
    room = model.config.get_text_config().max_position_embeddings - prompt.shape[1]
    made = model.generate(prompt, do_sample=False, max_new_tokens=min(MOST_CHECKED, room), **given)
    return made[0, prompt.shape[1] :].tolist()


def written_by_onnx(folder: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> list[int]:
    """Return the ``count`` likeliest tokens after CHECKED by ONNX Runtime."""
    import numpy as np
    import onnxruntime

    ids = np.array([_checked(tokenizer)])
    latents = {}
    if (folder / ENCODER).exists():
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        latents["latents"] = onnxruntime.InferenceSession(folder / ENCODER).run(["mu"], inputs)[0]
    decoder = onnxruntime.InferenceSession(folder / DECODER)
    entries = [given for given in decoder.get_inputs() if given.name.startswith("past_key_values")]
    cache = [np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32) for given in entries]
    new, made = ids[:, :-1], []
    for _ in range(count):
        mask = np.ones((1, cache[0].shape[2] + new.shape[1]), np.int64)
        past = {given.name: tensor for given, tensor in zip(entries, cache)}
        logits, *cache = decoder.run(None, {"input_ids": new, "attention_mask": mask, **past, **latents})
        made.append(int(logits[0, -1].argmax()))
        new = np.array([made[-1:]])
    return made


# ---- the graphs -------------------------------------------------------------------------------------------------------------


class DecoderGraph(nn.Module):
    """A decoder whose cache is a list of tensors. z is none of them: its keys and values are computed in each call."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor], latents: Tensor | None = None):
        """Return [logits, present keys and values ...]; ``past`` has the keys and the values of each layer in turn."""
        config, length = self.model.config.get_text_config(), input_ids.shape[1]
        cache, given = DynamicCache(config=config), {}
        first = 0 if latents is None else 1  # z's entry of the cache
        if latents is not None:
            self.model.remember(cache, latents)
            given["latents"] = latents
        for layer in range(config.num_hidden_layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, cache=cache, use_cache=True, **given
        )
        present = [part[:, :, first:] for layer in outputs.cache.layers for part in (layer.keys, layer.values)]
        return [outputs.logits, *present]


class EncoderGraph(nn.Module):
    """The encoder of a `TextVAE`, with the latent's linear layer."""

    def __init__(self, model: TextVAE):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.posterior(input_ids, attention_mask)


def write_graphs(model: PreTrainedModel, folder: Path) -> None:
    """Write the ONNX files of a model on transformers' own attention."""
    if isinstance(model, TextVAE):
        _write_encoder(model, folder / ENCODER)
    _write_decoder(model, folder / DECODER)


def _write_decoder(model: PreTrainedModel, path: Path) -> None:
    config = model.config.get_text_config()
    batch, length, past = Dim("batch"), Dim("length"), Dim("past", min=0)
    ids = torch.full((2, 3), config.bos_token_id)
    cached = [torch.zeros(2, config.num_key_value_heads, 5, config.head_dim) for _ in range(2 * config.num_hidden_layers)]
    inputs = {"input_ids": ids, "attention_mask": torch.ones(2, 8, dtype=torch.int64), "past": cached}
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: Dim.DYNAMIC}}
    shapes["past"] = [{0: batch, 2: past} for _ in cached]
    entries = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(f"past_key_values.{entry}" for entry in entries)]
    if isinstance(model, TextVAE):
        inputs["latents"], shapes["latents"] = torch.zeros(2, model.config.latent_dim), {0: batch}
        names.append("latents")
    _write(DecoderGraph(model), inputs, shapes, names, ["logits", *(f"present.{entry}" for entry in entries)], path)


def _write_encoder(model: TextVAE, path: Path) -> None:
    batch, length = Dim("batch"), Dim("length")
    ids = torch.full((2, 3), model.config.bos_token_id)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _write(EncoderGraph(model), inputs, dict.fromkeys(inputs, {0: batch, 1: length}), [*inputs], ["mu", "logvar"], path)


def _write(graph: nn.Module, inputs: dict, shapes: dict, names: list[str], outputs: list[str], path: Path) -> None:
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph.eval(),
            kwargs=inputs,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=outputs,
            dynamo=True,
            verbose=False,
        )
        program.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings, which are of its own code."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
