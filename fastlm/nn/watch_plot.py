"""Draw what `fastlm.watch` has seen as heat maps."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .layer_stats import LayerStats

try:
    from matplotlib.figure import Figure
except ImportError:
    raise ImportError("the plot of fastlm.watch needs matplotlib, which is missing: pip install 'fastlm[plot]'") from None


def draw(layers: Mapping[str, LayerStats]) -> Figure:
    """Return a figure with a map of layers and heads for each statistic."""
    maps = {
        "entropy, nats": [layer.entropy for layer in layers.values()],
        "largest logit": [layer.max_logit for layer in layers.values()],
    }
    masses = [layer.key_mass for layer in layers.values()]
    if all(mass is not None for mass in masses):
        maps["share of the first key"] = [m[:, 0] if m.shape[1] else m.new_zeros(m.shape[0]) for m in masses]
    names = [name or "the model" for name in layers]
    heads = max(len(layer.rows) for layer in layers.values())
    figure = Figure(figsize=(2.0 + len(maps) * (1.5 + 0.25 * heads), 1.5 + 0.3 * len(names)), layout="constrained")
    for i, (axes, (title, rows)) in enumerate(zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items())):
        image = axes.imshow(_matrix(rows, heads), aspect="auto")
        axes.set(title=title, xlabel="head", yticks=range(len(names)), yticklabels=names if i == 0 else [""] * len(names))
        figure.colorbar(image, ax=axes)
    return figure


def _matrix(rows: list[Tensor], heads: int) -> Tensor:
    """Return rows (heads of a layer,) as one matrix (layers, heads), NaN where a layer has fewer heads."""
    matrix = torch.full((len(rows), heads), torch.nan, dtype=torch.float64)
    for into, row in zip(matrix, rows):
        into[: len(row)] = row.masked_fill(row.isinf(), torch.nan)
    return matrix.numpy()
