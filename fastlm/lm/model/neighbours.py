"""The words of a vocabulary, and the words whose vectors in a model's embedding are near to each other."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def words_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Return word -> ids of the tokens that are this word, without the special tokens.

    A word of a byte-level BPE may be two tokens, with the blank before it and without. Tokens that are a part of a character,
    or white space alone, are no words. The id of a token with the blank comes first.
    """
    found: dict[str, list[int]] = {}
    special = set(tokenizer.all_special_ids)
    texts = {number: tokenizer.decode([number]) for number in range(len(tokenizer)) if number not in special}
    for number, text in sorted(texts.items(), key=lambda pair: not pair[1].startswith(" ")):
        if (word := text.strip()) and "\ufffd" not in word and len(word.split()) == 1:
            found.setdefault(word, []).append(number)
    return found


def neighbours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, word: str, count: int = 10
) -> list[tuple[str, float]]:
    """Return the ``count`` words of the vocabulary whose vectors are nearest to that of ``word``, with their cosines.

    A token stands for each word of the vocabulary, the one with a blank before it where there are two. A ``word`` of several
    tokens has the mean of their vectors.

    Raises:
        ValueError: ``word`` is empty, or unknown to a vocabulary of words; ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    if not word.strip():
        raise ValueError("word must not be empty")
    words = words_of(tokenizer)
    vector = _vector_of(model, tokenizer, word.strip(), words)
    others = [(other, ids[0]) for other, ids in words.items() if other != word.strip()]
    matrix = model.get_input_embeddings().weight.detach()[[number for _, number in others]].float()  # (words, width)
    cosine = nn.functional.normalize(matrix, dim=-1) @ nn.functional.normalize(vector, dim=0)
    best = cosine.topk(min(count, len(others)))
    return [(others[index][0], value) for index, value in zip(best.indices.tolist(), best.values.tolist())]


def _vector_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, word: str, words: Mapping[str, list[int]]
) -> torch.Tensor:
    ids = words.get(word, [])[:1] or tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"word must be one of the vocabulary, which has no token for {word!r}")
    return model.get_input_embeddings().weight.detach()[ids].float().mean(0)  # (width,)
