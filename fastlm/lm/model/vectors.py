"""Pre-trained word vectors in a new model's embedding."""

import os
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..data.word_vectors import read_vectors
from .neighbours import words_of


class Matched(NamedTuple):
    """The tokens that have a vector.

    Attributes:
        ids: (matched,), sorted.
        vectors: (matched, width of the model), as the embedding has them.
        words, of: the number of words that were found in the file, and that of the vocabulary's words.
        width: of the file's vectors.
        kept: the share of the vectors' squared length that their projection to the model's width keeps.
    """

    ids: Tensor
    vectors: Tensor
    words: int
    of: int
    width: int
    kept: float

    def __str__(self) -> str:
        kept = (
            f", of which {self.vectors.shape[1]} dimensions keep {self.kept:.1%}" if self.width > self.vectors.shape[1] else ""
        )
        share = f"{self.words} of the vocabulary's {self.of} words ({self.words / self.of:.1%}) have a vector"
        return f"{share}, in {len(self.ids)} tokens; {self.width} numbers{kept}"


@torch.no_grad()
def use_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike, *, frozen: bool = False
) -> Matched:
    """Put the vectors of a word2vec or GloVe file into the rows of a model's embedding whose tokens are its words.

    A word takes the vector of its own spelling, or else of its lower case, in each of its tokens: a BPE may have one with the
    blank before it and one without. Vectors of another width than the model's are projected: see `projected`. They are then
    scaled, all alike, which cosines do not see. The other rows stay as they are.

    Args:
        frozen: whether training will leave them as they are. They then get a length of about 1, as the output layer shares them
            and its logits could not grow; else they get the root mean square of the model's own, from which training starts
            better (a tiny decoder after an epoch of the default corpus: 5.89 for 6.83 nats per token, and 4.91 for 5.07).

    Raises:
        FileNotFoundError, ValueError: as `fastlm.lm.data.word_vectors.read_vectors`, or the file has a vector for no word.
    """
    embedding = model.get_input_embeddings().weight
    words = words_of(tokenizer)
    lowered: dict[str, list[str]] = {}
    for word in words:
        lowered.setdefault(word.lower(), []).append(word)
    exact, by_case = {}, {}
    for word, vector in read_vectors(path):
        if word in words:
            exact.setdefault(word, vector)
        for other in lowered.get(word, ()):
            by_case.setdefault(other, vector)
    found = by_case | exact
    if not found:
        raise ValueError(f"{path} has a vector for none of the {len(words)} words of the vocabulary")
    rows = {number: index for index, word in enumerate(found) for number in words[word]}
    given = torch.stack([torch.from_numpy(vector.copy()) for vector in found.values()])  # (words, width of the file)
    vectors, kept = projected(given, embedding.shape[1])
    size = vectors.square().mean().sqrt()
    wanted = embedding.shape[1] ** -0.5 if frozen else embedding.square().mean().sqrt()
    vectors = vectors * (wanted / size) if size > 0 else vectors
    ids = torch.tensor(sorted(rows))
    vectors = vectors[[rows[number] for number in ids.tolist()]]
    embedding[ids] = vectors
    return Matched(ids, vectors, len(found), len(words), given.shape[1], kept)


def projected(vectors: Tensor, width: int) -> tuple[Tensor, float]:
    """Return vectors (N, W) in ``width`` dimensions, and the share of their squared length that is kept.

    In more dimensions every cosine stays: they are rotated into the larger space. In fewer, they are projected to their
    principal directions, which keeps the cosines as well as a linear map can.
    """
    if width == vectors.shape[1]:
        return vectors, 1.0
    if width > vectors.shape[1]:
        generator = torch.Generator().manual_seed(0)
        rotation = torch.linalg.qr(torch.randn(width, vectors.shape[1], generator=generator)).Q  # orthonormal columns
        return vectors @ rotation.T, 1.0
    _, directions = torch.linalg.eigh(vectors.T.double() @ vectors.double())  # by ascending eigenvalue
    result = vectors @ directions[:, -width:].to(vectors.dtype)
    whole = vectors.square().sum()
    return result, float(result.square().sum() / whole) if whole > 0 else 1.0
