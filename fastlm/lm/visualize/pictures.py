"""Pictures of attention weights, as SVG: all weights of a head on a short text, and where they go along any text."""

import base64
import io
from html import escape

import numpy as np
from matplotlib.image import imsave
from torch import Tensor

CELL = 14  # pixels of a weight
INK = (0x3B, 0x7D, 0xD8)
BARS = 160  # of a strip, at most


def heatmap(weights: Tensor, queries: list[str], keys: list[str]) -> str:
    """Return an SVG of weights (Lq, Lk). Its labels are in a margin that the style sheet adds on the left and on top."""
    width, height = CELL * len(keys), CELL * len(queries)
    rows = "".join(
        f'<text x="-5" y="{CELL * i + 11}" text-anchor="end">{short(label)}</text>' for i, label in enumerate(queries)
    )
    columns = "".join(
        f'<text transform="translate({CELL * j + 11} -5) rotate(-90)">{short(label)}</text>' for j, label in enumerate(keys)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" style="--width:{width}px" role="img" aria-label="attention weights">'
        f'{rows}{columns}<image href="{png_of(weights)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f'<rect width="{width}" height="{height}"/></svg>'
    )


def short(label: str) -> str:
    """Return a label cut to 12 characters, as HTML."""
    return escape(label if len(label) <= 12 else label[:11] + "…")


def png_of(weights: Tensor) -> str:
    """Return a picture of weights (Lq, Lk) as a data URL, where a pixel's opacity is the square root of its weight."""
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = INK
    pixels[..., 3] = np.rint(255 * np.sqrt(weights.numpy().clip(0, 1)))
    file = io.BytesIO()
    imsave(file, pixels, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def strip(shares: Tensor, alone: int) -> str:
    """Return an SVG with bars of the shares (Lk,) along a text, the highest bar as high as the picture."""
    heights = np.sqrt(binned(shares.double().numpy(), alone))
    steps = "".join(f"V{y}h1" for y in np.rint(100 * (1 - heights / max(heights.max(), 1e-9))).astype(int))
    return (
        f'<svg class="strip" viewBox="0 0 {len(heights)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="where the weights go along the text"><path d="M0 100{steps}V100z"/></svg>'
    )


def binned(shares: np.ndarray, alone: int, most: int = BARS) -> np.ndarray:
    """Return the sums of shares (Lk,) over at most ``most`` runs of keys. The first ``alone`` keys have runs of their own."""
    if len(shares) <= most:
        return shares
    rest = np.linspace(alone, len(shares), most - alone, endpoint=False).astype(int)
    return np.add.reduceat(shares, np.concatenate([np.arange(alone), rest]))
