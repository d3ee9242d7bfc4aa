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


class InRandomOrder(Sampler):
    """Sample the texts in random order, another one in each epoch. The texts that do not fill a batch are left out.

    Args:
        shares: the number of equal shares of a batch.
        copies: how many processes in a row read each share.

    Raises:
        ValueError: there are fewer texts than a batch takes.
    """

    def __init__(self, texts: Texts, batch: int, *, shares: int = 1, copies: int = 1):
        self.texts, self.batch, self.shares, self.copies = texts, batch, shares, copies
        if len(texts) < batch:
            raise ValueError(f"batch_size must be at most the number of texts, {len(texts)}; got {batch}")

    def __len__(self) -> int:
        return len(self.texts) // self.batch * self.batch * self.copies

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.texts.seed, self.texts.epoch, 0))
        order = torch.randperm(len(self.texts), generator=generator)[: len(self) // self.copies]
        return iter(order.view(-1, self.batch // self.shares).repeat_interleave(self.copies, 0).flatten().tolist())


class Collator:
    """Make a batch of items: the decoder's input and labels, and for a `TextVAE` the encoder's input.

    Args:
        encoder: whether the model has an encoder.
        packed: put the texts behind one another, instead of padding them to the longest.
        dropout: the share of the decoder's input tokens that are masked (`word_dropout`).
        masking: the share of the encoder's input tokens that are masked, in spans (`span_masking`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder: bool = True,
        packed: bool = False,
        dropout: float = 0.0,
        masking: float = 0.0,
    ) -> None:
        self.pad, self.bos, self.mask = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id
        self.encoder, self.packed, self.dropout, self.masking = encoder, packed, dropout, masking

    def plain(self) -> "Collator":
        """Return a copy for evaluation, which pads texts of about equal lengths, and does not augment them."""
        plain = copy(self)
        plain.packed, plain.dropout, plain.masking = False, 0.0, 0.0
        return plain

    def __call__(self, items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``labels`` and ``encoder_input_ids``, and ``seeds`` (B,).

        The first three are (B, L), padded on the right; or packed, (1, tokens), with ``position_ids`` and ``cu_seq_lens_q`` as
        `TextVAE` and the models of transformers take them.
        """
        texts, seeds = zip(*items)
        batch = {"input_ids": list(map(self._dropped, texts, seeds)), "labels": texts}
        if self.encoder:
            batch["encoder_input_ids"] = list(map(self._masked, texts, seeds))
        batch = packed(batch) if self.packed else self._padded(batch)
        if self.encoder:
            batch["seeds"] = torch.tensor(seeds)
        return batch

    def _padded(self, rows: dict[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        batch = {name: padded(tensors, IGNORED if name == "labels" else self.pad) for name, tensors in rows.items()}
        # The causal decoder needs no attention_mask, as its tokens never attend to padding on the right.
        if self.encoder:
            batch["encoder_attention_mask"] = (batch["labels"] != IGNORED).long()
        return batch

    def _dropped(self, ids: Tensor, seed: int) -> Tensor:
        return word_dropout(ids, self.dropout, self.mask, seed=seed, keep=ids == self.bos) if self.dropout else ids

    def _masked(self, ids: Tensor, seed: int) -> Tensor:
        return span_masking(ids, self.masking, self.mask, seed=seed + 1, keep=ids == self.bos)[0] if self.masking else ids


def packed(rows: dict[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Put the rows (L_i,) of each name behind one another, as (1, tokens), and add what says where each begins.

    The first label of a row is ignored, as nothing before it predicts it.
    """
    lengths = [len(row) for row in rows["labels"]]
    batch = {name: torch.cat(list(tensors)).unsqueeze(0) for name, tensors in rows.items()}
    batch["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    batch["labels"][0, batch["cu_seq_lens_q"][:-1]] = IGNORED
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return batch | {name.replace("input", "position"): positions for name in rows if name != "labels"}


def padded_ids(rows: Sequence[Tensor], pad: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to the longest: return (ids, mask), each (B, L), where the mask is 1 at tokens, 0 at padding."""
    mask = padded([torch.ones_like(row) for row in rows], 0, side)
    return padded(rows, pad, side), mask


def padded(rows: Iterable[Tensor], value: int, side: str = "right") -> Tensor:
    """Pad rows (L_i,) to the longest: return (B, L)."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
