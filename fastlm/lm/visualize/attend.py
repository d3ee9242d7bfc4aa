"""A page on the inside of a model: its attention on a sentence, the effect of its latent's units, a map of the corpus."""

import os
from pathlib import Path

import torch

from ..data.batches import encode_text
from ..data.prepare import REPORT
from ..files import replaced_together
from ..model import checkpoint as checkpoints
from ..model.text_vae import TextVAE
from ..training.settings import SETTINGS, settings_of
from .attention_maps import attention_of
from .latent_maps import active_units, held_out, map_of, means_of, traverse
from .page import ModelView, page_of

MAX_TEXTS = 1000  # on the map
UNITS = 5  # of the latent, each with a traversal


def attend(
    checkpoint: str | os.PathLike,
    sentence: str,
    output: str | os.PathLike = "attend.html",
    corpus: str | os.PathLike | None = None,
) -> Path:
    """Write an HTML page on what a checkpoint makes of a sentence or a longer text: of as many tokens as it has positions.

    Args:
        corpus: a prepared corpus, for the map of a `TextVAE`; None for the one it was trained on, if that is still there.

    Returns:
        ``output``.

    Raises:
        ValueError: the sentence is empty or no text; ``output`` is a folder; the checkpoint or the corpus is damaged.
        FileNotFoundError: there is no such checkpoint or corpus.
    """
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"output must be a file; {output} is a folder")
    if not sentence.strip():
        raise ValueError("sentence must not be empty")
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"sentence must be text; its character {error.start + 1} is a lone surrogate") from None
    page = page_of(inspect_model(checkpoint, sentence, corpus_of(Path(checkpoint)) if corpus is None else corpus))
    with replaced_together(output.parent, [output.name]) as unfinished:
        (unfinished / output.name).write_text(page, "utf-8", errors="xmlcharrefreplace")  # labels may contain lone surrogates
    return output


def corpus_of(checkpoint: Path) -> Path | None:
    """Return the corpus that a run was trained on, or None if it is gone."""
    if not (checkpoint / SETTINGS).is_file():
        return None
    _, corpus = settings_of(checkpoint)
    return corpus if (corpus / REPORT).is_file() else None


def inspect_model(checkpoint: str | os.PathLike, sentence: str, corpus: str | os.PathLike | None = None) -> ModelView:
    """Compute what the page shows, without a map if ``corpus`` is None."""
    model, tokenizer = checkpoints.load(checkpoint)
    records = None if corpus is None else held_out(corpus, MAX_TEXTS)
    most = model.config.get_text_config().max_position_embeddings
    read = encode_text(sentence, tokenizer, most + 1)
    ids = torch.tensor([read[:most]])
    found = sentence, ids.shape[1], len(read) > most, attention_of(model, tokenizer, ids)
    if not isinstance(model, TextVAE):
        return ModelView(*found)
    z = means_of(model, tokenizer, [sentence], most)[0]
    means = None if records is None else means_of(model, tokenizer, [record["text"] for record in records])
    traversals = traverse(model, tokenizer, z, active_units(z, means, UNITS))
    return ModelView(*found, traversals, None if records is None else map_of(means, z, records))
