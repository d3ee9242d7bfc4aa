"""What the plots share: readable sizes, colours that the colour-blind can tell apart (Okabe and Ito), and a way to save."""

from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
GREY = "#666666"

rcParams |= {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E0E0E0",
    "lines.linewidth": 2.2,
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches. Not by way of pyplot: no window, and nothing to close."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")
