"""Share among the plots readable sizes, colours that the colour-blind can tell apart (Okabe and Ito), and ways to save.

A plot is drawn once for white and black pages: as SVG its colours become variables of the page's style sheet.
"""

import io
import re
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
BROWN, OLIVE, WINE = "#8c6d46", "#7f8c1f", "#882255"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BROWN, OLIVE, WINE)
INK, GREY, GRID = "#1f2328", "#66707a", "#dfe3e8"
DASHES = (0, (5, 4))

# Each colour has a variable's name and its value on a dark page.
VARIABLES = {
    BLUE: ("blue", "#4aa8e0"),
    VERMILION: ("vermilion", "#f08a4b"),
    GREEN: ("green", "#2fc79a"),
    PURPLE: ("purple", "#dd9cc0"),
    ORANGE: ("orange", "#f0b429"),
    SKY: ("sky", "#8fd0f5"),
    BROWN: ("brown", "#c4a273"),
    OLIVE: ("olive", "#b9c64b"),
    WINE: ("wine", "#cf6aa0"),
    INK: ("ink", "#e6e9ec"),
    GREY: ("grey", "#9aa4ae"),
    GRID: ("grid", "#343a41"),
}

rcParams |= {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "lines.linewidth": 2.2,
    "svg.fonttype": "none",  # Text stays text.
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that many inches. Without pyplot there is no window, and nothing to close."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Save a figure as a PNG on white."""
    figure.savefig(path, dpi=150, facecolor="white")


def svg(figure: Figure, name: str) -> str:
    """Return an <svg> element with the page's colours. ``name`` keeps its identifiers apart from other pictures'."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(id="|href="#|url\(#)', lambda match: match.group(1) + name + "-", text)
    width = f'style="max-width: {figure.get_figwidth():.2f}in"'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" {width} role="img">', text, count=1)
    text = text.replace("'DejaVu Sans', 'Bitstream Vera Sans'", "system-ui")
    for colour, (variable, _) in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text
