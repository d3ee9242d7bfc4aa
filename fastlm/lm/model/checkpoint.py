"""Checkpoints: a folder as transformers' `save_pretrained` writes it, with the tokenizer. Nothing in it is unpickled."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from ..data.tokenizer import FILE as TOKENIZER
from ..data.tokenizer import load_tokenizer
from ..files import replaced_together
from .presets import ATTENTION, on_kernels
from .text_vae import TextVAE

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FILES = (WEIGHTS, TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "generation_config.json", CONFIG)
MODELS: dict[str, type[PreTrainedModel]] = {cls.config_class.model_type: cls for cls in (TextVAE, LlamaForCausalLM)}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike) -> None:
    """Write a checkpoint; the files of an earlier one stay until all of the new ones are whole.

    Raises:
        OSError: the disk is full; the earlier files are unchanged.
    """
    with replaced_together(Path(folder), FILES) as unfinished:
        try:
            with quiet():
                model.save_pretrained(unfinished)
                with _special_tokens_in_texts(tokenizer):
                    tokenizer.save_pretrained(unfinished)
            shutil.copymode(unfinished / CONFIG, unfinished / WEIGHTS)  # safetensors makes it readable by the owner alone
        except SafetensorError as error:
            raise OSError(f"{folder}: the weights could not be written: {error}") from error


def load(
    folder: str | os.PathLike, models: dict[str, type[PreTrainedModel]] = MODELS
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a checkpoint: return (model, tokenizer), with the model in evaluation mode.

    Args:
        models: the classes of the expected models, by the config's model_type.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, cut short, or of another model.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint of fastlm.lm, as it lacks {name}: fastlm lm train")
    kind = kind_of(folder)
    if kind not in models:
        raise ValueError(f"{folder} is a checkpoint of a model of type {kind!r}; expected {' or '.join(map(repr, models))}")
    check_whole(folder / WEIGHTS)
    try:
        with quiet():  # transformers would warn of missing weights, which are an error below
            options = {"attn_implementation": ATTENTION, "local_files_only": True, "use_safetensors": True}
            model, info = models[kind].from_pretrained(folder, output_loading_info=True, **options)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := info[what]:
            name = what.replace("_keys", "")
            raise ValueError(f"{folder}: {WEIGHTS} is not that of {CONFIG}: {name} {len(wrong)}, {sorted(map(str, wrong))[0]}")
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != (size := model.get_input_embeddings().num_embeddings):
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, and the model {size}")
    return on_kernels(model).eval(), tokenizer


@contextmanager
def _special_tokens_in_texts(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Save a tokenizer as transformers' chat templates need it, which write special tokens as text; ours are read by `load`."""
    kept = tokenizer.init_kwargs.get("split_special_tokens", False)
    tokenizer.init_kwargs["split_special_tokens"] = tokenizer.split_special_tokens = False
    try:
        yield
    finally:
        tokenizer.init_kwargs["split_special_tokens"] = tokenizer.split_special_tokens = kept


def kind_of(folder: Path) -> str:
    """Return the model_type of a checkpoint's config."""
    try:
        return str(json.loads((folder / CONFIG).read_text("utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged, or no model's config: {error!r}") from None


def check_whole(path: Path) -> None:
    """Raise a ValueError if a file of weights is cut short or otherwise damaged."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and messages in the block."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
