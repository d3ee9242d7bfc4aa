"""The text of the page whose tokens can be clicked, and the data that its script (script.py) reads."""

import base64
import json
from collections.abc import Sequence
from html import escape

import numpy as np

from .attention_maps import Attention

BUDGET = 7_500_000  # characters of data on a page
ENTRY = 4  # characters of a key and its weight


def kept_keys(attentions: Sequence[Attention]) -> int:
    """Return how many of the largest weights of each token fit on the page: at least one, at most all that were found."""
    rows = sum(attention.look.top_keys[..., 0].numel() for attention in attentions)
    found = max(attention.look.top_keys.shape[-1] for attention in attentions)
    return max(1, min(found, BUDGET // (ENTRY * rows)))


def reader_of(attention: Attention, kept: int) -> str:
    """Return the text as tokens, the controls, which the script reveals, and the data: ``kept`` keys of each token."""
    layers, heads = attention.entropy.shape
    left_out = attention.look.top_keys.shape[-1] - kept
    fewer = f" The page would be too large with more than the {kept} largest of each token." if left_out else ""
    tokens = "".join(
        f'<span class="{"token" if j >= attention.before else "key"}">{escape(label)}</span>' + "<br>" * ("↵" in label)
        for j, label in enumerate(attention.keys)
    )
    return (
        f'<h3>What a token looks at</h3><div class="reader" data-stack="{attention.stack}"><div class="controls" hidden>'
        f'<label>Layer <select class="layer">{_options(layers)}</select></label> '
        f'<label>Head <select class="head"><option value="-1">all, averaged</option>{_options(heads)}</select></label> '
        "<span>Click a token, or walk through the text with the arrow keys: what it looks at most gets the strongest color."
        f"{fewer}</span></div>"
        "<noscript><p>Without scripts the tokens cannot be clicked.</p></noscript>"
        f'<div class="tokens">{tokens}</div><div class="found" aria-live="polite"></div>'
        f'<script type="application/json" class="data">{json.dumps(data_of(attention, kept))}</script></div>'
    )


def _options(count: int) -> str:
    return "".join(f'<option value="{i}">{i + 1}</option>' for i in range(count))


def data_of(attention: Attention, kept: int) -> dict[str, int | str]:
    """Return the largest weights of each token for the script.

    ``keys`` and ``weights`` are base64 of little-endian arrays (layers, heads, Lq, kept): of uint16, or uint32 for more than
    65,536 keys, and of uint8. A weight w is kept as round(255 sqrt(w)), which small weights need; 0 where there is no key.
    """
    keys, weights = (tensor[..., :kept].numpy() for tensor in (attention.look.top_keys, attention.look.top_weights))
    layers, heads, queries, _ = keys.shape
    sizes = {"layers": layers, "heads": heads, "queries": queries, "kept": kept, "before": attention.before}
    sizes["bytes"] = 2 if len(attention.keys) <= 1 << 16 else 4
    return {
        **sizes,
        "keys": _base64(keys.clip(0).astype(f"<u{sizes['bytes']}")),
        "weights": _base64(np.rint(255 * np.sqrt(weights.clip(0, 1))).astype(np.uint8)),
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
