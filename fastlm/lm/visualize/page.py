"""The page on the inside of a model, as HTML: each head's attention, the effect of the latent's units, a map of the corpus."""

from dataclasses import dataclass
from html import escape

import numpy as np

from .attention_maps import Attention
from .heads import cards_of, glance_of
from .latent_maps import TRAVERSED, VALUES, Map, Traversal
from .reader import kept_keys, reader_of
from .script import SCRIPT
from .style import STYLE


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
    """Return the whole page as self-contained HTML. Only the text whose tokens can be clicked needs its script."""
    sentence = escape(view.sentence)
    tokens = f"The first {view.tokens} tokens; the rest is left out." if view.cut else f"{view.tokens} tokens."
    body = [
        f"<h1>Inside the model</h1><blockquote>{sentence}</blockquote>",
        f"<p>{tokens} {_extremes(view.attentions)}</p>",
        *(_attention(attention, kept_keys(view.attentions)) for attention in view.attentions),
        "<h2>Latent</h2>" + _latent(view),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Inside the model: {escape(view.sentence[:60])}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n"
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


def _attention(attention: Attention, kept: int) -> str:
    """Return the section of a stack: its heads at a glance, the text to click, with ``kept`` keys a token, and each head."""
    reads = {
        "decoder": "Each token looks at itself and at those before it, to predict the next one.",
        "encoder": "Each token looks at the whole text.",
    }[attention.stack]
    latent = " In front of them lies z, the latent." if attention.before else ""
    return (
        f"<h2>Attention of the {attention.stack}</h2><p>{reads}{latent}</p>"
        + glance_of(attention)
        + reader_of(attention, kept)
        + cards_of(attention)
    )


def _latent(view: ModelView) -> str:
    if view.traversals is None:
        return "<p>This model is a plain decoder: it has no latent.</p>"
    how = "whose mean varies most over the corpus" if view.map else "with the largest means for this sentence"
    return (
        "<p>The mean of the sentence's posterior, with one unit at a time set to another value, and decoded greedily up to "
        f'{TRAVERSED} tokens: of the units {how}.</p><div class="traversals">{"".join(map(_traversal, view.traversals))}</div>'
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
