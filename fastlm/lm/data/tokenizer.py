"""Vocabularies, made with the tokenizers library: a byte-level BPE for any language, or words, for pre-trained vectors."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:  # preparing a corpus needs no transformers, which take a second to import
    from transformers import PreTrainedTokenizerFast

FILE = "tokenizer.json"
SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "mask_token": "<|mask|>"}  # ids 0 to 3
# A model of texts knows no roles: a dialogue is one text to it, which it goes on with.
CHAT = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
UNKNOWN = "<|unk|>"  # id 4 of a vocabulary of words; a vocabulary of bytes needs none
_BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` tokens; decoding restores every text, in any language, exactly.

    The tokenizer adds no token before or after a text: the training of a model adds <|bos|> and <|eos|>. Memory grows with the
    number of different words. The same texts give the same vocabulary.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes.
    """
    check_bpe_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def check_bpe_size(vocab_size: int) -> None:
    """Raise a ValueError unless ``vocab_size`` has room for the bytes and the special tokens."""
    least = _BYTES + len(SPECIAL)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, the bytes and the special tokens; got {vocab_size}")


def train_words(texts: Iterable[str], vocab_size: int, *, lowercase: bool = False, min_frequency: int = 2) -> Tokenizer:
    """Train a vocabulary of the most frequent words and punctuation marks of ``texts``; all others become <|unk|>.

    Each Chinese character is a word. White space is lost: decoding puts one blank between words. There are fewer than
    ``vocab_size`` tokens where fewer words occur ``min_frequency`` times.

    Raises:
        ValueError: ``vocab_size`` has no room for a word.
    """
    special = [*SPECIAL.values(), UNKNOWN]
    if vocab_size <= len(special):
        raise ValueError(f"vocab_size must be above {len(special)}, the special tokens; got {vocab_size}")
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


VOCABULARIES = {"bpe": train_bpe, "words": train_words}


def load_tokenizer(path: str | os.PathLike) -> "PreTrainedTokenizerFast":
    """Load a trained tokenizer for transformers, with its special tokens set, from a tokenizer.json or its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is no tokenizer of fastlm.lm.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no class of its own
        raise ValueError(f"{path} is no tokenizer, or damaged: {error}") from error
    if missing := [token for token in SPECIAL.values() if tokenizer.token_to_id(token) is None]:
        raise ValueError(f"{path} is no tokenizer of fastlm.lm: it lacks {', '.join(missing)}")
    unknown = {"unk_token": UNKNOWN} if tokenizer.token_to_id(UNKNOWN) is not None else {}
    options = {"clean_up_tokenization_spaces": False, "split_special_tokens": True}  # a text's own "<|eos|>" is a text
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options, **SPECIAL, **unknown)


def begin_texts(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Make a tokenizer put <|bos|> before a text, and give it a chat template.

    transformers' pipelines and server then hand a model what it was trained on, because the tokenizer is saved with it.
    """
    frame_texts(tokenizer, [tokenizer.bos_token, "$A"])
    tokenizer.chat_template = CHAT


def frame_texts(tokenizer: "PreTrainedTokenizerFast", single: list[str], **pair: list[str]) -> None:
    """Make a tokenizer put <|bos|> and <|eos|> around a text, or a ``pair`` of texts, as templates of tokenizers say it."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special, **pair)
