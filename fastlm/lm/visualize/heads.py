"""The part of the page on the heads of a stack: a table of their entropies, and a card on where each one's weights go."""

from html import escape

from torch import Tensor

from .attention_maps import Attention
from .pictures import heatmap, strip

FEW = 16  # labels of at most this many keys are legible in a small picture
LISTED = 10  # keys in the table of a head that has no map
VISIBLE = 0.005  # Smaller weights are left out of a token's row.


def glance_of(attention: Attention) -> str:
    """Return a table of the heads of each layer, colored by the share of the highest entropy, with links to their cards."""
    rows = "".join(
        f'<tr><th scope="row">layer {layer + 1}</th>'
        + "".join(
            f'<td style="--share:{share:.2f}"><a href="#{_anchor(attention, layer, head)}" data-layer="{layer}" '
            f'data-head="{head}">{share:.2f}<i>{nats:.2f}</i></a></td>'
            for head, (nats, share) in enumerate(zip(entropies, shares))
        )
        + "</tr>"
        for layer, (entropies, shares) in enumerate(zip(attention.entropy.tolist(), attention.breadth.tolist()))
    )
    heads = "".join(f'<th scope="col">{head + 1}</th>' for head in range(attention.entropy.shape[1]))
    return (
        "<p>How broadly each head looks: its entropy as a share of the highest, below it in nats, averaged over the tokens. "
        f"With all places alike it would be {attention.uniform:.2f} nats. A head leads to where its weights go.</p>"
        f'<div class="table"><table class="glance"><tr><th scope="col">head</th>{heads}</tr>{rows}</table></div>'
    )


def cards_of(attention: Attention) -> str:
    """Return the cards of the heads, layer by layer."""
    size = "few" if len(attention.keys) <= FEW else "many"
    layers = "".join(
        f'<h4>Layer {layer + 1}</h4><div class="heads {size}">'
        + "".join(_card(attention, layer, head) for head in range(attention.entropy.shape[1]))
        + "</div>"
        for layer in range(attention.entropy.shape[0])
    )
    more = (
        "In the map, each row is a token; the darker, or in the dark the brighter, the more. Open a head for its numbers."
        if attention.look.weights is not None
        else "Open a head for the places that get most."
    )
    return (
        "<h3>Where the weights go</h3><p>The bars stand along the text, for the share of all of a head's weights that a place "
        "gets; a first bar that towers is an attention sink. Bars and maps show square roots, so that small weights can be "
        f"seen; each head's bars have a scale of their own. {more}</p>{layers}"
    )


def _anchor(attention: Attention, layer: int, head: int) -> str:
    return f"{attention.stack}-{layer + 1}-{head + 1}"


def _card(attention: Attention, layer: int, head: int) -> str:
    """Return a head's entropy, bars and, of a short text, map, which open to a table of its numbers."""
    nats, share = float(attention.entropy[layer, head]), float(attention.breadth[layer, head])
    shares, look = attention.shares[layer, head], attention.look
    top, most = int(shares.argmax()), float(shares.max())
    plot, table = "", _most_attended(attention, shares)
    if look.weights is not None:
        plot = f'<div class="plot">{heatmap(look.weights[layer, head], attention.queries, attention.keys)}</div>'
        table = _rows(attention, look.top_keys[layer, head], look.top_weights[layer, head])
    return (
        f'<details id="{_anchor(attention, layer, head)}"><summary><b>{layer + 1}.{head + 1}</b> '
        f'{nats:.2f} nats <span class="share">· {share:.2f} · most on {escape(attention.keys[top])}, {100 * most:.1f}%</span>'
        f'<span class="bar"><span style="width:{100 * share:.0f}%"></span></span>{strip(shares, attention.before + 1)}{plot}'
        f"</summary><p>The largest score is {float(look.max_logit[layer, head].max()):.1f}.</p>"
        f'<div class="table">{table}</div></details>'
    )


def _rows(attention: Attention, keys: Tensor, weights: Tensor) -> str:
    """Return a table of the three largest weights of each token."""
    rows = "".join(
        f"<tr><th>{escape(query)}</th>"
        + "".join(f"<td>{escape(attention.keys[j])} <i>{w:.2f}</i></td>" for w, j in zip(row[:3], at) if w >= VISIBLE)
        + "</tr>"
        for query, row, at in zip(attention.queries, weights.tolist(), keys.tolist())
    )
    return f'<table><tr><th>token</th><th colspan="3">looks at</th></tr>{rows}</table>'


def _most_attended(attention: Attention, shares: Tensor) -> str:
    """Return a table of the keys that get the largest shares (Lk,) of the weights."""
    largest, places = shares.topk(min(LISTED, len(shares)))
    rows = "".join(
        f"<tr><th>{escape(attention.keys[j])}</th><td>{_place(attention, j)}</td><td>{100 * w:.1f}%</td></tr>"
        for w, j in zip(largest.tolist(), places.tolist())
    )
    return f"<table><tr><th>token</th><th>place</th><th>share of the weights</th></tr>{rows}</table>"


def _place(attention: Attention, key: int) -> str:
    """Return the number of a key's token in the text, from 1, or nothing for the latent."""
    return "" if key < attention.before else str(key - attention.before + 1)
