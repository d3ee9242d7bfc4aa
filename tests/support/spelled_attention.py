"""Attention as people spell it out: once, and in any of thousands of ways that a generator draws."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from fastlm.testing import seeded_normal


def scores_of(query: Tensor, key: Tensor, *_) -> Tensor:
    """Return the scaled scores."""
    return query @ key.transpose(-2, -1) * 0.3


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(scores) @ value."""
    return scores_of(query, key).softmax(-1) @ value


def gradients(out: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients of ``tensors`` for fixed normals as that of ``out``."""
    return torch.autograd.grad(out, tensors, seeded_normal(9, out.shape, out.dtype), allow_unused=True)


# ---- the generator ----------------------------------------------------------------------------------------------------------

LETTERS = {
    3: ("zqd,zkd->zqk", "zqk,zkd->zqd"),
    4: ("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"),
    5: ("awhid,awhjd->awhij", "awhij,awhjd->awhid"),
}
DOTS = "... i d, ... j d -> ... i j", "... i j, ... j d -> ... i d"
LEAD = {3: (6,), 4: (2, 3), 5: (2, 2, 3)}

PRODUCTS = ("@", "torch.matmul", "matmul", "bmm", "baddbmm", "einsum", "dots")
SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda s, c: s,
    "*": lambda s, c: s * c,
    "c *": lambda s, c: c * s,
    "mul_": lambda s, c: s.mul_(c),
    "*=": lambda s, c: s.__imul__(c),
    "/": lambda s, c: s / (1 / c),
    "div_": lambda s, c: s.div_(1 / c),
    "torch.div": lambda s, c: torch.div(s, 1 / c),
    "0-d": lambda s, c: s * torch.tensor(c),
    "sqrt": lambda s, c: s / torch.sqrt(torch.tensor(c**-2)),
}
BIASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda s, b: s + b,
    "b +": lambda s, b: b.contiguous() + s,
    "add_": lambda s, b: s.add_(b),
    "+=": lambda s, b: s.__iadd__(b),
    "-": lambda s, b: s - b,
}
FILLS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "masked_fill": lambda s, hidden, fill: s.masked_fill(hidden, fill),
    "masked_fill_": lambda s, hidden, fill: s.masked_fill_(hidden, fill),
    "fill 0-d": lambda s, hidden, fill: s.masked_fill(hidden, torch.tensor(fill, dtype=s.dtype)),
    "where": lambda s, hidden, fill: torch.where(~hidden, s, fill),
    "where hidden": lambda s, hidden, fill: torch.where(hidden, fill, s),
    "method where": lambda s, hidden, fill: s.where(~hidden, torch.tensor(fill, dtype=s.dtype)),
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "F": lambda s: F.softmax(s, dim=-1),
    "torch": lambda s: torch.softmax(s, -1),
    "method": lambda s: s.softmax(dim=-1),
    "module": nn.Softmax(dim=-1),
    "positive dim": lambda s: s.softmax(s.dim() - 1),
    "dtype": lambda s: F.softmax(s, dim=-1, dtype=torch.float64 if s.dtype == torch.float64 else torch.float32).to(s.dtype),
    "float": lambda s: (s if s.dtype == torch.float64 else s.float()).softmax(-1).type_as(s),
}
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda w: w,
    "no dropout": lambda w: F.dropout(w, 0.0),
    "eval dropout": nn.Dropout(0.5).eval(),
    "contiguous": lambda w: w.contiguous(),
    "view": lambda w: w.view(w.shape),
    "there and back": lambda w: w.unsqueeze(0).squeeze(0),
    "reshaped": lambda w: w.reshape(-1, *w.shape[-2:]).view(w.shape),
}
TOUCHES: dict[str, Callable[[Tensor], object]] = {
    "max": lambda t: t.max(),
    "sum": lambda t: t.sum(),
    "slice": lambda t: t[..., :2],
    "transpose": lambda t: t.transpose(-1, -2) * 2,
    "clone": lambda t: t.clone(),
    "detach": lambda t: t.detach(),
    "stack": lambda t: torch.stack([t, t]),
    "exp": lambda t: torch.exp(t),
    "scaled": lambda t: t * 3.0,
    "added to itself": lambda t: t + t,
}
PLACES = ("product", "scale", "bias", "mask", "softmax", "after")


@dataclass(frozen=True)
class Spelling:
    """One way to write attention."""

    dims: int
    product: str
    scale: str
    bias: str | None
    bias_shape: str
    mask: str | None
    mask_shape: str
    fill: float
    softmax: str
    after: str
    dtype: torch.dtype
    touch: str | None
    place: str

    def inputs(self, rows: int = 6, keys: int = 9, head_dim: int = 8) -> dict[str, Tensor]:
        """Draw query, key, value, bias and the condition that hides keys."""
        lead = LEAD[self.dims]
        shapes = {"query": (*lead, rows, head_dim), "key": (*lead, keys, head_dim), "value": (*lead, keys, 5)}
        shapes["bias"] = self._shape(self.bias_shape, lead, rows, keys)
        tensors = {name: seeded_normal(i, shape, self.dtype) for i, (name, shape) in enumerate(shapes.items())}
        hidden = seeded_normal(9, self._shape(self.mask_shape, lead, rows, keys), torch.float64) > 0.3
        if self.mask_shape == "causal":
            hidden = torch.ones(rows, keys, dtype=torch.bool).triu(1 + keys - rows)
        if self.fill == -math.inf:  # Rows that are hidden whole are NaN in torch.
            hidden[..., 0] = False
        elif self.mask_shape != "causal":
            hidden[..., :1, :] = True
        return {**tensors, "hidden": hidden}

    def is_touched(self) -> bool:
        """Tell whether the place of the touch is one that this spelling has."""
        return self.touch is not None and getattr(self, self.place) is not None

    @staticmethod
    def _shape(name: str, lead: tuple, rows: int, keys: int) -> tuple[int, ...]:
        shapes = {
            "full": (*lead, rows, keys),
            "heads": (*lead[-1:], rows, keys),
            "keys": (*lead[:1], *(1,) * len(lead), keys),
            "all": (rows, keys),
            "causal": (rows, keys),
        }
        return shapes[name]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return the product with the values, and what was seen of scores or weights on the way."""
        seen: list[Tensor] = []

        def touched(place: str, tensor: Tensor) -> Tensor:
            if self.touch is not None and self.place == place:
                seen.append(TOUCHES[self.touch](tensor))
            return tensor

        scores = touched("product", self._scores(query, key))
        scores = touched("scale", SCALES[self.scale](scores, query.shape[-1] ** -0.5))
        if self.bias is not None:
            scores = touched("bias", BIASES[self.bias](scores, bias))
        if self.mask is not None:
            scores = touched("mask", FILLS[self.mask](scores, hidden, self.fill))
        weights = touched("softmax", SOFTMAXES[self.softmax](scores))
        weights = touched("after", AFTER[self.after](weights))
        return self._out(weights, value), *seen

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        if self.product == "einsum":
            return torch.einsum(LETTERS[self.dims][0], query, key)
        if self.product == "dots":
            return torch.einsum(DOTS[0], query, key)
        transposed = key.transpose(-2, -1)
        if self.product == "torch.matmul":
            return torch.matmul(query, transposed)
        if self.product == "matmul":
            return query.matmul(transposed)
        if self.product in ("bmm", "baddbmm"):
            query, transposed = query.flatten(0, -3), key.flatten(0, -3).mT
            if self.product == "bmm":
                scores = torch.bmm(query, transposed)
            else:
                empty = query.new_zeros(query.shape[0], query.shape[1], transposed.shape[2])
                scores = torch.baddbmm(empty, query, transposed, beta=0.0, alpha=1.0)
            return scores.view(*key.shape[:-2], *scores.shape[1:])
        return query @ transposed

    def _out(self, weights: Tensor, value: Tensor) -> Tensor:
        if self.product == "einsum":
            return torch.einsum(LETTERS[self.dims][1], weights, value)
        if self.product == "dots":
            return torch.einsum(DOTS[1], weights, value)
        if self.product == "torch.matmul":
            return torch.matmul(weights, value)
        if self.product == "matmul":
            return weights.matmul(value)
        if self.product in ("bmm", "baddbmm"):
            out = weights.view(-1, *weights.shape[-2:]).bmm(value.flatten(0, -3))
            return out.view(*value.shape[:-2], *out.shape[1:])
        return weights @ value


def spellings(touched: bool) -> st.SearchStrategy[Spelling]:
    """Draw spellings, with something else that looks at scores or weights on the way if they are to be ``touched``."""
    return st.builds(
        Spelling,
        dims=st.sampled_from((3, 4, 5)),
        product=st.sampled_from(PRODUCTS),
        scale=st.sampled_from(tuple(SCALES)),
        bias=st.sampled_from((None, *BIASES)),
        bias_shape=st.sampled_from(("full", "heads", "keys", "all")),
        mask=st.sampled_from((None, *FILLS)),
        mask_shape=st.sampled_from(("full", "heads", "keys", "all", "causal")),
        fill=st.sampled_from((-math.inf, -1e4, -3e4)),
        softmax=st.sampled_from(tuple(SOFTMAXES)),
        after=st.sampled_from(tuple(AFTER)),
        dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
        touch=st.sampled_from(tuple(TOUCHES)) if touched else st.none(),
        place=st.sampled_from(PLACES),
    )
