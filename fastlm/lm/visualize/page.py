"""The page on the inside of a model, as HTML: each head's attention, the effect of the latent's units, a map of the corpus."""

import base64
import io
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.image import imsave
from torch import Tensor

from .attention_maps import Attention
from .latent_maps import VALUES, Map, Traversal
from .style import STYLE

CELL = 14  # pixels of a weight
FEW = 16  # labels of at most this many keys are legible in a small picture
INK = (0x3B, 0x7D, 0xD8)


@dataclass(frozen=True)
class ModelView:
    """What the page shows of a model and a sentence. ``traversals`` need a `TextVAE`, and ``map`` needs a corpus too."""

    sentence: str
    tokens: int
    cut: bool
    attentions: list[Attention]
    traversals: list[Traversal] | None = None
    map: Map | None = None


def page_of(view: ModelView) -> str:
    """Return the whole page as self-contained HTML without scripts."""
    sentence = escape(view.sentence)
    tokens = f"The first {view.tokens} tokens; the rest is left out." if view.cut else f"{view.tokens} tokens."
    body = [
        f"<h1>Inside the model</h1><blockquote>{sentence}</blockquote>",
        f"<p>{tokens} {_extremes(view.attentions)}</p>",
        *map(_attention, view.attentions),
        "<h2>Latent</h2>" + _latent(view),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Inside the model: {escape(view.sentence[:60])}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _extremes(attentions: list[Attention]) -> str:
    """Return a paragraph that names the sharpest and the broadest heads."""
    heads = sorted(
        (float(value), f"{attention.stack} {layer + 1}.{head + 1}")
        for attention in attentions
        for layer, row in enumerate(attention.breadth)
        for head, value in enumerate(row)
    )
    sharp, broad = (", ".join(f"{name} ({value:.2f})" for value, name in part) for part in (heads[:3], heads[:-4:-1]))
    return (
        f"The sharpest heads are <strong>{sharp}</strong>; the broadest are <strong>{broad}</strong>. Heads go by layer and "
        "number; the figure is the entropy of a head's attention as a share of the highest: 0 where each token looks at one "
        "place only, 1 where it looks at all the places it may look at alike."
    )


def _attention(attention: Attention) -> str:
    """Return the section of a stack, with the heads of each layer."""
    reads = {
        "decoder": "Each row is a token that looks at itself and at those before it, to predict the next one.",
        "encoder": "Each row is a token that looks at the whole text.",
    }[attention.stack]
    latent = " The first column, z, is the latent." if attention.keys != attention.queries else ""
    layers = "".join(
        f'<h3>Layer {layer + 1}</h3><div class="heads {"few" if len(attention.keys) <= FEW else "many"}">'
        + "".join(_head(attention, layer, head) for head in range(len(row)))
        + "</div>"
        for layer, row in enumerate(attention.weights)
    )
    return (
        f"<h2>Attention of the {attention.stack}</h2><p>{reads}{latent} The darker, or in the dark the brighter, the more; "
        f"weights are shown by their square roots. Open a head for its tokens and numbers. With all places alike the entropy "
        f"would be {attention.uniform:.2f} nats.</p>{layers}"
    )


def _head(attention: Attention, layer: int, head: int) -> str:
    """Return a picture of a head's weights, which opens to a table of the three largest weights of each token."""
    nats, share = float(attention.entropy[layer, head]), float(attention.breadth[layer, head])
    weights = attention.weights[layer, head]
    strongest, places = weights.topk(min(3, len(attention.keys)))
    rows = "".join(
        f"<tr><th>{escape(query)}</th>"
        + "".join(f"<td>{escape(attention.keys[j])} <i>{w:.2f}</i></td>" for w, j in zip(row, at) if w >= 0.005)
        + "</tr>"
        for query, row, at in zip(attention.queries, strongest.tolist(), places.tolist())
    )
    return (
        f"<details><summary><b>{layer + 1}.{head + 1}</b> "
        f'{nats:.2f} nats <span class="share">· {share:.2f}</span>'
        f'<span class="bar"><span style="width:{100 * share:.0f}%"></span></span>'
        f'<div class="plot">{_heatmap(weights, attention.queries, attention.keys)}</div></summary>'
        f'<div class="table"><table><tr><th>token</th><th colspan="3">looks at</th></tr>{rows}</table></div></details>'
    )


def _heatmap(weights: Tensor, queries: list[str], keys: list[str]) -> str:
    """Return an SVG of weights (Lq, Lk). Its labels are in a margin that the style sheet adds on the left and on top."""
    width, height = CELL * len(keys), CELL * len(queries)
    rows = "".join(
        f'<text x="-5" y="{CELL * i + 11}" text-anchor="end">{_short(label)}</text>' for i, label in enumerate(queries)
    )
    columns = "".join(
        f'<text transform="translate({CELL * j + 11} -5) rotate(-90)">{_short(label)}</text>' for j, label in enumerate(keys)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" style="--width:{width}px" role="img" aria-label="attention weights">'
        f'{rows}{columns}<image href="{_png(weights)}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f'<rect width="{width}" height="{height}"/></svg>'
    )


def _short(label: str) -> str:
    return escape(label if len(label) <= 12 else label[:11] + "…")


def _png(weights: Tensor) -> str:
    """Return a picture of weights (Lq, Lk) as a data URL, where a pixel's opacity is the square root of its weight."""
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = INK
    pixels[..., 3] = np.rint(255 * np.sqrt(weights.numpy().clip(0, 1)))
    file = io.BytesIO()
    imsave(file, pixels, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _latent(view: ModelView) -> str:
    if view.traversals is None:
        return "<p>This model is a plain decoder: it has no latent.</p>"
    how = "whose mean varies most over the corpus" if view.map else "with the largest means for this sentence"
    return (
        "<p>The mean of the sentence's posterior, with one unit at a time set to another value, and decoded greedily: of the "
        f'units {how}.</p><div class="traversals">{"".join(map(_traversal, view.traversals))}</div>'
        + ("<p>Without a corpus there is no map.</p>" if view.map is None else _map(view.map))
    )


def _traversal(traversal: Traversal) -> str:
    shown = (escape(text).replace("\n", "↵ ") or "<i>nothing</i>" for text in traversal.texts)
    rows = "".join(f"<tr><th>{value:g}</th><td>{text}</td></tr>" for value, text in zip(VALUES, shown))
    return f"<table><caption>Unit {traversal.unit}, {traversal.own:+.2f} here</caption>{rows}</table>"


def _map(plane: Map) -> str:
    """Return a scatter plot of the texts; the style sheet has a color for the class of each label."""
    classes = {label: f"label{i}" for i, (label, _) in enumerate(plane.labels)}
    every = np.vstack([plane.points, plane.sentence]) * (1, -1)  # an SVG's y grows downwards
    low, span = every.min(0), np.ptp(every, 0).clip(1e-6)
    (*places, (x, y)) = ((every - low) / span * (680, 440) + 20).round(1).tolist()
    behind = sorted(zip(plane.records, places), key=lambda dot: dot[0]["label"] in classes)  # other labels are drawn first
    dots = "".join(
        f'<circle class="{classes.get(record["label"], "other")}" cx="{cx}" cy="{cy}" r="4"><title>'
        f"{escape(str(record['label'] or 'no label'))}: {escape(record['text'][:80])}</title></circle>"
        for record, (cx, cy) in behind
    )
    rest = len(plane.records) - sum(count for _, count in plane.labels)
    named = [(classes[label], escape(label), count) for label, count in plane.labels] + [("other", "others", rest)] * bool(rest)
    legend = "".join(f'<li><span class="{name}"></span>{label} <i>{count}</i></li>' for name, label, count in named)
    first, second = (f"{100 * share:.0f}%" for share in plane.explained)
    return (
        f"<h2>Map of the corpus</h2><p>The posterior means of {len(plane.records)} test and validation texts, by their two "
        f"principal components, which hold {first} (across) and {second} (up) of the variance, each at a scale of its own. The "
        "ring is the sentence.</p>"
        f'<svg class="map" viewBox="0 0 720 480" role="img" aria-label="map of the corpus">{dots}'
        f'<circle class="sentence" cx="{x}" cy="{y}" r="10"/></svg><ul class="legend">{legend}</ul>'
    )
