"""Models whose attention is spelled out in torch's products and softmax, as in most tutorials and many libraries."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from suite.rows import Step
from torch import Tensor, nn

import fastlm
from workloads.timm_alone import import_timm


class SelfAttention(nn.Module):
    """Causal attention of 8 heads."""

    def __init__(self, width: int, dropout_p: float):
        super().__init__()
        self.projections, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout_p)
        self.register_buffer("seen", torch.ones(2048, 2048).tril().view(1, 1, 2048, 2048))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within x (B, L, E)."""
        length = x.shape[1]
        query, key, value = (part.unflatten(-1, (8, -1)).transpose(1, 2) for part in self.projections(x).chunk(3, dim=-1))
        scores = (query @ key.transpose(-2, -1)) * key.shape[-1] ** -0.5
        scores = scores.masked_fill(self.seen[:, :, :length, :length] == 0, float("-inf"))
        weights = self.dropout(F.softmax(scores, dim=-1))
        return self.out((weights @ value).transpose(1, 2).contiguous().flatten(-2))


class Layer(nn.Module):
    """A layer of a GPT."""

    def __init__(self, width: int, dropout_p: float):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = SelfAttention(width, dropout_p)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout_p))

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on x (B, L, E)."""
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def gpt() -> nn.Module:
    """Build two layers of a small GPT."""
    return nn.Sequential(*(Layer(256, 0.1) for _ in range(2)))


def gradients_of(model: nn.Module, *shape: int, training: bool = False) -> Step:
    """Run forward and backward on normals of that shape. Return the output and the first weights' gradient."""
    model.train(training)
    parameter = next(model.parameters())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(parameter.dtype)

    def step() -> tuple[Tensor, ...]:
        out = model(x)
        out.square().mean().backward()
        results = out.detach(), parameter.grad
        model.zero_grad(set_to_none=True)
        return results

    return step


def timm_model(name: str, **options) -> nn.Module:
    """Build a model of timm's that does not call torch's fused attention, as timm's own switch has it."""
    model = import_timm().create_model(name, pretrained=False, **options).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def with_weights(model: nn.MultiheadAttention, batch: int, length: int) -> Step:
    """Call MultiheadAttention as most code does: need_weights at its default, and the weights thrown away."""
    x = torch.randn(batch, length, model.embed_dim, generator=torch.Generator().manual_seed(1)).to(model.out_proj.weight.dtype)
    return torch.no_grad()(lambda: (model(x, x, x)[0],))


@contextlib.contextmanager
def used_and_found() -> Iterator[None]:
    """Run a step inside a block, in which attention must be found."""
    with fastlm.use() as report:
        yield
    if not report.routed:
        raise AssertionError(f"no attention was found: {report}")


def used(model: nn.Module):
    """Leave the model as it is, for a block around each step."""
    return used_and_found


def left(model: nn.Module):
    """Do the same for a model whose attention is too small for a block to take: it must not be slower there."""
    return fastlm.use
