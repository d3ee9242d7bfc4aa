"""Context parallel: several processes share the tokens of each text, beside the data parallel of transformers' Trainer.

The ranks of torchrun form groups of N in a row. A group reads the same texts, and each of its ranks has a part of their tokens.
A rank's loss is its share of the whole batch's. The Trainer multiplies it by the number of ranks and averages the gradients
over them, which gives the gradients of one process.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..model.text_vae import IGNORED


def groups_of(context_parallel: int) -> int:
    """Return how many groups of ``context_parallel`` ranks torchrun's processes form.

    Raises:
        ValueError: they form none, or some are left over.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if context_parallel < 1:
        raise ValueError(f"context_parallel must be at least 1; got {context_parallel}")
    if context_parallel > 1 and processes == 1:
        raise ValueError(
            f"context_parallel must be 1 in a single process; got {context_parallel}: start {context_parallel} by "
            f"torchrun --nproc-per-node {context_parallel}"
        )
    if processes % context_parallel:
        raise ValueError(f"context_parallel must divide the number of processes, {processes}; got {context_parallel}")
    return processes // context_parallel


def own_group(context_parallel: int, timeout: float) -> "dist.ProcessGroup | None":
    """Return this rank's group, or None for one rank alone; all ranks call this. A transfer fails after ``timeout`` seconds."""
    if context_parallel == 1:
        return None
    return dist.new_subgroups(context_parallel, timeout=timedelta(seconds=timeout))[0]


class PartCollator:
    """Make of each batch of a `Collator` this rank's part (B, L / ranks), with the labels shifted before the cut.

    Where the ranks do not divide the length, the batch is padded further; nothing sees that.

    Args:
        collate: the `Collator`.
        pad: the token id of padding.
        rank, ranks: which part, of how many.
    """

    def __init__(self, collate: Callable, pad: int, rank: int, ranks: int):
        self.collate, self.rank, self.ranks = collate, rank, ranks
        self.fill = {"input_ids": pad, "encoder_input_ids": pad, "encoder_attention_mask": 0, "labels": IGNORED}

    def plain(self) -> "PartCollator":
        """Return a copy without augmentation, for evaluation."""
        return PartCollator(self.collate.plain(), self.fill["input_ids"], self.rank, self.ranks)

    def __call__(self, items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Return a `Collator`'s batch, and ``shift_labels`` and the ``position_ids`` of decoder and encoder, all cut."""
        batch = self.collate(items)
        missing = -batch["labels"].shape[1] % self.ranks
        batch |= {name: F.pad(batch[name], (0, missing), value=value) for name, value in self.fill.items() if name in batch}
        places = torch.arange(batch["labels"].shape[1]).expand(batch["labels"].shape)
        batch |= {name.replace("input", "position"): places for name in ("input_ids", "encoder_input_ids") if name in batch}
        batch["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        return {name: tensor if name == "seeds" else self._part(tensor) for name, tensor in batch.items()}

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.ranks, 1)[self.rank].contiguous()
