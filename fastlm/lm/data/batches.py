"""Batches to train on: the texts of a prepared corpus as ids, in an order and with a noise that depend on the seed alone."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from hashlib import blake2b
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from ..model.text_vae import IGNORED
from .augment import span_masking, word_dropout
from .prepare import read_split

POOL = 50  # batches


class Texts(Dataset):
    """A split of a prepared corpus as token ids, each text between <|bos|> and <|eos|>, cut at ``max_tokens``.

    The ids lie in a file without a name, so that memory holds but a number for each text. Item i is (ids (L,), the text's seed
    in this epoch). ``words`` is how many words, parted by white space, all of them have.

    Raises:
        FileNotFoundError, ValueError: `fastlm.lm.prepare.read_split`'s; the split is empty.
    """

    def __init__(
        self, corpus: str | os.PathLike, split: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int = 0
    ) -> None:
        self.seed, self.epoch, self.words = seed, 0, 0
        ends = [0]
        with TemporaryFile() as file:
            for record in read_split(corpus, split):
                ids = encode_text(record["text"], tokenizer, max_tokens)
                cut = ids[-1] != tokenizer.eos_token_id
                self.words += len((tokenizer.decode(ids[1:]) if cut else record["text"]).split())
                np.array(ids, np.int32).tofile(file)
                ends.append(ends[-1] + len(ids))
            if len(ends) == 1:
                raise ValueError(f"{corpus} has no {split} texts")
            file.flush()
            self.ids = np.memmap(file, np.int32, "r")  # keeps the file
        self.ends = np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        ids = torch.from_numpy(self.ids[self.ends[index] : self.ends[index + 1]].astype(np.int64))
        return ids, seed_of(self.seed, self.epoch, index)

    @property
    def lengths(self) -> list[int]:
        """Of the texts, in tokens."""
        return np.diff(self.ends).tolist()

    def batches(self, size: int, collate: Callable) -> DataLoader:
        """All texts once, from short to long: for evaluation."""
        return DataLoader(self, size, sampler=np.argsort(self.lengths, kind="stable").tolist(), collate_fn=collate)

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has noise of its own; the data loader says when one begins."""
        self.epoch = epoch


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[int]:
    """The token ids of a text between <|bos|> and <|eos|>, at most ``max_tokens`` in all; a text that is cut has no end."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id][:max_tokens]


def seed_of(seed: int, epoch: int, index: int) -> int:
    """Of a text in an epoch, whatever else is in its batch; a hash, as torch's CPU generator reads 32 bits of a seed only."""
    digest = blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ByLength(Sampler):
    """The texts in random order, but those of a batch of about the same length, so that little is padding.

    Pools of POOL batches, drawn at random, are sorted by length and cut into batches, which are given in random order. The few
    that make no whole batch are left out, others in each epoch.

    Raises:
        ValueError: there are not enough texts for a batch.
    """

    def __init__(self, texts: Texts, batch: int):
        self.texts, self.batch, self.lengths = texts, batch, torch.tensor(texts.lengths)
        if len(texts) < batch:
            raise ValueError(f"batch_size must be at most the number of texts, {len(texts)}; got {batch}")

    def __len__(self) -> int:
        return len(self.texts) // self.batch * self.batch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.texts.seed, self.texts.epoch, 0))
        pools = torch.randperm(len(self.texts), generator=generator)[: len(self)].split(POOL * self.batch)
        batches = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools]).view(-1, self.batch)
        return iter(batches[torch.randperm(len(batches), generator=generator)].flatten().tolist())


class Collator:
    """Items to a batch: what the decoder reads and predicts, and for a `TextVAE` what the encoder reads.

    Args:
        encoder: whether the model has one.
        dropout: the share of the decoder's tokens that are hidden from it (`word_dropout`).
        masking: the share of the encoder's tokens that are hidden from it, in spans (`span_masking`).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, encoder: bool = True, dropout: float = 0.0, masking: float = 0.0
    ) -> None:
        self.pad, self.bos, self.mask = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id
        self.encoder, self.dropout, self.masking = encoder, dropout, masking

    def plain(self) -> "Collator":
        """The same without augmentation: for evaluation."""
        plain = copy(self)
        plain.dropout = plain.masking = 0.0
        return plain

    def __call__(self, items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and ``encoder_input_ids`` (B, L), padded on the right; ``seeds`` (B,)."""
        texts, seeds = zip(*items)
        batch = {"input_ids": padded(map(self._dropped, texts, seeds), self.pad), "labels": padded(texts, IGNORED)}
        if self.encoder:  # a causal decoder never looks at padding on its right, and needs no attention_mask
            batch["encoder_input_ids"] = padded(map(self._masked, texts, seeds), self.pad)
            batch["encoder_attention_mask"] = (batch["labels"] != IGNORED).long()
            batch["seeds"] = torch.tensor(seeds)
        return batch

    def _dropped(self, ids: Tensor, seed: int) -> Tensor:
        return word_dropout(ids, self.dropout, self.mask, seed=seed, keep=ids == self.bos) if self.dropout else ids

    def _masked(self, ids: Tensor, seed: int) -> Tensor:
        return span_masking(ids, self.masking, self.mask, seed=seed + 1, keep=ids == self.bos)[0] if self.masking else ids


def padded_ids(rows: Sequence[Tensor], pad: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """(ids, mask), each (B, L) of the longest, of texts given as ids; the mask is 1 at tokens, 0 at padding."""
    mask = padded([torch.ones_like(row) for row in rows], 0, side)
    return padded(rows, pad, side), mask


def padded(rows: Iterable[Tensor], value: int, side: str = "right") -> Tensor:
    """(B, L) of the longest."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
