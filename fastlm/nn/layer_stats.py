"""Sum up the statistics of a layer's attention, in memory that does not depend on the number of calls, without waiting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.attention.call import AttentionCall


@dataclass(frozen=True)
class LayerStats:
    """Hold what a layer's attention did, on the CPU. A row is a query of one batch entry that saw a key.

    Attributes:
        calls: the number of calls.
        rows: int64 (heads,), the number of rows.
        nan_rows: int64 (heads,), the rows whose statistics were NaN, which count nowhere else.
        entropy: float64 (heads,), the mean over all rows, in nats; NaN without rows, as the next.
        least_entropy: float64 (heads,), the lowest of a row.
        max_logit: float64 (heads,), the largest score of all calls, after softcap, slopes and mask; -inf without rows.
        key_mass: float64 (heads, longest), the share of the weight that a position receives, as a mean over all rows. What
            is missing from a sum of 1 went to a sink. None if not asked for.
    """

    calls: int
    rows: Tensor
    nan_rows: Tensor
    entropy: Tensor
    least_entropy: Tensor
    max_logit: Tensor
    key_mass: Tensor | None


class Totals:
    """Add up the statistics of the calls of one layer on one device. Nothing waits for the device."""

    def __init__(self, heads: int, device: torch.device, key_mass: bool) -> None:
        self.calls = 0
        self.rows, self.nan_rows, self.mass_rows = torch.zeros(3, heads, dtype=torch.int64, device=device)
        self.entropy = torch.zeros(heads, dtype=torch.float64, device=device)
        self.least_entropy = torch.full_like(self.entropy, math.inf)
        self.max_logit = torch.full_like(self.entropy, -math.inf)
        self.key_mass = self.entropy.new_zeros(heads, 0) if key_mass else None

    def add(self, call: AttentionCall, entropy: Tensor, max_logit: Tensor, key_mass: Tensor) -> None:
        """Add a call's entropy and max_logit (B, H, Lq), and its key_mass (B, H, Lk) if that is added up here."""
        self.calls += 1
        if not entropy.numel():
            return
        both = entropy + max_logit
        seen = both > -math.inf  # (B, H, Lq): rows that saw a key, and have no NaN
        self.rows += seen.sum((0, 2))
        self.nan_rows += both.isnan().sum((0, 2))
        self.entropy += entropy.where(seen, 0.0).sum((0, 2), dtype=torch.float64)
        self.least_entropy = self.least_entropy.minimum(entropy.where(seen, math.inf).amin((0, 2)))
        self.max_logit = self.max_logit.maximum(max_logit.where(seen, -math.inf).amax((0, 2)))
        if self.key_mass is not None and key_mass.numel():
            self._add_mass(call.cu_seqlens_k, seen, key_mass.double())

    def _add_mass(self, cu_seqlens: Tensor | None, seen: Tensor, key_mass: Tensor) -> None:
        whole = ~key_mass.isnan().any(2)  # (B, H): a row that is NaN makes NaN of all that is summed with it
        self.mass_rows += seen.sum(2).where(whole, 0).sum(0)
        mass = key_mass.where(whole.unsqueeze(2), 0.0).sum(0)  # (H, Lk)
        keys = mass.shape[1]
        if keys > self.key_mass.shape[1]:
            self.key_mass = _widened(self.key_mass, keys)
        if cu_seqlens is None:
            self.key_mass[:, :keys] += mass
        else:
            self.key_mass.index_add_(1, _positions(cu_seqlens, keys), mass)


def _positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return the position (total,) that each packed row has in its sequence."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.bucketize(row, cu_seqlens[1:].long(), right=True).clamp(max=cu_seqlens.shape[0] - 1)
    return (row - cu_seqlens.long()[sequence]).clamp(0, total - 1)  # Wrong bounds must not reach outside of the tensors.


def _widened(mass: Tensor, keys: int) -> Tensor:
    return torch.nn.functional.pad(mass, (0, keys - mass.shape[1]))


def merged(parts: Sequence[Totals]) -> LayerStats:
    """Return what the totals of one layer, one for each device, say together."""
    parts = [{name: t.cpu() if isinstance(t, Tensor) else t for name, t in vars(part).items()} for part in parts]
    rows, nan_rows, mass_rows, entropy = (
        sum(part[name] for part in parts) for name in ("rows", "nan_rows", "mass_rows", "entropy")
    )
    least = torch.stack([part["least_entropy"] for part in parts]).amin(0)
    return LayerStats(
        calls=sum(part["calls"] for part in parts),
        rows=rows,
        nan_rows=nan_rows,
        entropy=entropy / rows,
        least_entropy=least.where(rows > 0, math.nan),
        max_logit=torch.stack([part["max_logit"] for part in parts]).amax(0),
        key_mass=None if parts[0]["key_mass"] is None else _shares([part["key_mass"] for part in parts], mass_rows),
    )


def _shares(masses: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return the mean mass (heads, longest) of each position, without positions at the end that never received any."""
    keys = max(mass.shape[1] for mass in masses)
    mass = sum(_widened(mass, keys) for mass in masses)
    reached = mass.ne(0.0).any(0).nonzero()
    longest = int(reached[-1]) + 1 if len(reached) else 0
    return mass[:, :longest] / rows.clamp(min=1).unsqueeze(1)
