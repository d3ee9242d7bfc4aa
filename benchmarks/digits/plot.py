"""Draw pictures of digits."""

from pathlib import Path

import torch
from report.plot_style import new_figure, save
from torch import Tensor


def draw_digits(path: Path, rows: dict[str, Tensor], side: int, width: int) -> None:
    """Draw ``rows`` of images (N, side * side) in [0, 1] under their titles, ``width`` to a line, dark ink on white."""
    heights = [-(-len(images) // width) for images in rows.values()]
    figure = new_figure(0.6 * width, 0.6 * sum(heights) + 0.35 * len(rows))
    axes = figure.subplots(len(rows), height_ratios=heights)
    for axis, (title, images) in zip(axes, rows.items()):
        axis.imshow(_tiles(images, side, width), cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
        axis.set_title(title)
        axis.axis("off")
    save(figure, path)


def _tiles(images: Tensor, side: int, width: int) -> Tensor:
    """Join images (N, side * side) into one of ceil(N / width) x width tiles, each with a white frame."""
    frame = max(1, side // 16)
    height, tile = -(-len(images) // width), side + 2 * frame
    tiles = torch.zeros(height * width, tile, tile)
    tiles[: len(images), frame:-frame, frame:-frame] = images.reshape(-1, side, side)
    return tiles.reshape(height, width, tile, tile).transpose(1, 2).reshape(height * tile, width * tile)
