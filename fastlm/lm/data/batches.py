"""Batches for training: the texts of a prepared corpus as token ids. Their order and noise depend on the seed alone."""

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

POOL = 50  # batches per pool of `ByLength`


class Texts(Dataset):
    """A split of a prepared corpus as token ids, each text between <|bos|> and <|eos|>, cut at ``max_tokens``.

    The ids are in an unnamed temporary file, so that memory holds one number per text. Item i is the ids (L,) of text i and the
    text's seed in this epoch. ``words`` counts the words of all texts, separated by white space.

    Raises:
        FileNotFoundError, ValueError: as `fastlm.lm.data.prepare.read_split`, or the split is empty.
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
                raise ValueError(f"{corpus} has no {split} texts: prepare it of more documents, or with a larger --{split}")
            file.flush()
            self.ids = np.memmap(file, np.int32, "r")  # the map keeps the file alive
        self.ends = np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        ids = torch.from_numpy(self.ids[self.ends[index] : self.ends[index + 1]].astype(np.int64))
        return ids, seed_of(self.seed, self.epoch, index)

    @property
    def lengths(self) -> list[int]:
        """Return the length of each text in tokens."""
        return np.diff(self.ends).tolist()

    def batches(self, size: int, collate: Callable) -> DataLoader:
        """Return a loader of all texts for evaluation: each text once, from short to long."""
        return DataLoader(self, size, sampler=np.argsort(self.lengths, kind="stable").tolist(), collate_fn=collate)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, whose number changes the noise; the Trainer's data loader calls this when an epoch begins."""
        self.epoch = epoch


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[int]:
    """Return the token ids of a text between <|bos|> and <|eos|>, at most ``max_tokens`` in all; a cut text has no <|eos|>."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id][:max_tokens]


def seed_of(seed: int, epoch: int, index: int) -> int:
    """Return the seed of a text in an epoch, which does not depend on the rest of its batch.

    It is a hash, because torch's CPU generator reads only 32 bits of a seed.
    """
    digest = blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ByLength(Sampler):
    """Sample the texts in random order, with batches of about equal lengths, so that there is little padding.

    Each random pool of POOL batches is sorted by length and cut into batches. The batches come in random order. The texts that
    do not fill a batch are left out; they are different ones in each epoch.

    Args:
        shares: the number of equal shares of a batch.
        copies: how many processes in a row read each share.

    Raises:
        ValueError: there are fewer texts than a batch takes.
    """

    def __init__(self, texts: Texts, batch: int, *, shares: int = 1, copies: int = 1):
        self.texts, self.batch, self.lengths = texts, batch, torch.tensor(texts.lengths)
        self.shares, self.copies = shares, copies
        if len(texts) < batch:
            raise ValueError(f"batch_size must be at most the number of texts, {len(texts)}; got {batch}")

    def __len__(self) -> int:
        return len(self.texts) // self.batch * self.batch * self.copies

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.texts.seed, self.texts.epoch, 0))
        whole = len(self) // self.copies
        pools = torch.randperm(len(self.texts), generator=generator)[:whole].split(POOL * self.batch)
        batches = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools]).view(-1, self.batch)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        return iter(batches.view(-1, self.batch // self.shares).repeat_interleave(self.copies, 0).flatten().tolist())


class Collator:
    """Make a batch of items: the decoder's input and labels, and for a `TextVAE` the encoder's input.

    Args:
        encoder: whether the model has an encoder.
        dropout: the share of the decoder's input tokens that are masked (`word_dropout`).
        masking: the share of the encoder's input tokens that are masked, in spans (`span_masking`).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, encoder: bool = True, dropout: float = 0.0, masking: float = 0.0
    ) -> None:
        self.pad, self.bos, self.mask = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id
        self.encoder, self.dropout, self.masking = encoder, dropout, masking

    def plain(self) -> "Collator":
        """Return a copy without augmentation, for evaluation."""
        plain = copy(self)
        plain.dropout = plain.masking = 0.0
        return plain

    def __call__(self, items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``labels`` and ``encoder_input_ids`` (B, L), padded on the right, and ``seeds`` (B,)."""
        texts, seeds = zip(*items)
        batch = {"input_ids": padded(map(self._dropped, texts, seeds), self.pad), "labels": padded(texts, IGNORED)}
        # The causal decoder needs no attention_mask, as its tokens never attend to padding on the right.
        if self.encoder:
            batch["encoder_input_ids"] = padded(map(self._masked, texts, seeds), self.pad)
            batch["encoder_attention_mask"] = (batch["labels"] != IGNORED).long()
            batch["seeds"] = torch.tensor(seeds)
        return batch

    def _dropped(self, ids: Tensor, seed: int) -> Tensor:
        return word_dropout(ids, self.dropout, self.mask, seed=seed, keep=ids == self.bos) if self.dropout else ids

    def _masked(self, ids: Tensor, seed: int) -> Tensor:
        return span_masking(ids, self.masking, self.mask, seed=seed + 1, keep=ids == self.bos)[0] if self.masking else ids


def padded_ids(rows: Sequence[Tensor], pad: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to the longest: return (ids, mask), each (B, L), where the mask is 1 at tokens, 0 at padding."""
    mask = padded([torch.ones_like(row) for row in rows], 0, side)
    return padded(rows, pad, side), mask


def padded(rows: Iterable[Tensor], value: int, side: str = "right") -> Tensor:
    """Pad rows (L_i,) to the longest: return (B, L)."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
