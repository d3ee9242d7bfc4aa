"""Write blocks as one HTML file that needs no other: pictures are in it, and nothing is asked of any server."""

import base64
import html
from functools import singledispatch
from pathlib import Path

from report.blocks import Block, Bullets, Code, Details, Heading, Photo, Plot, Table, Text, Warn, marked
from report.plot_style import VARIABLES, svg

WIDE = 2  # So many panels of a plot stand side by side where there is room. On a phone they stand below each other.

_LIGHT = " ".join(f"--{name}: {colour};" for colour, (name, _) in VARIABLES.items())
_DARK = " ".join(f"--{name}: {dark};" for name, dark in VARIABLES.values())
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --band: #f4f6f8; --warn: #fff1e5; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --band: #1d2227; --warn: #3a2a1c; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--grid); font-size: 1.3rem; }
h3 { font-size: 1.1rem; }
p, li { max-width: 44rem; }
code, pre { background: var(--band); border-radius: 4px; padding: 0.1em 0.3em; font-size: 0.9em; }
pre { padding: 0.8rem; overflow-x: auto; }
.warn { background: var(--warn); border-left: 4px solid var(--vermilion); padding: 0.6rem 1rem; font-weight: 600; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.45rem; text-align: left; border-bottom: 1px solid var(--grid); white-space: nowrap; }
td:last-child { white-space: normal; min-width: 10rem; }
th { background: var(--band); } tr:hover td { background: var(--band); }
figure { margin: 1.2rem 0; } figure svg { display: block; width: 100%; height: auto; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.narrow { display: none; }
@media (max-width: 44rem) { .wide { display: none; } .narrow { display: block; }  body { padding: 0.7rem; } }
summary { cursor: pointer; padding: 0.4rem 0; color: var(--blue); }
""".replace("LIGHT", _LIGHT).replace("DARK", _DARK)


def write_html(blocks: list[Block], path: Path) -> None:
    """Write the page, whose title is that of its first heading."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_block(block) for block in blocks)
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _inline(text: str) -> str:
    tags = {"bold": "strong", "italic": "em", "code": "code"}

    def write(kind: str, piece: str) -> str:
        return html.escape(piece) if kind == "text" else f"<{tags[kind]}>{html.escape(piece)}</{tags[kind]}>"

    return marked(text.strip(), write)


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"block must be one of page.Block; got {type(block).__name__}")


@_block.register
def _(block: Heading) -> str:
    return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"


@_block.register
def _(block: Text) -> str:
    return f"<p>{_inline(block.text)}</p>"


@_block.register
def _(block: Warn) -> str:
    return f'<p class="warn">{_inline(block.text)}</p>'


@_block.register
def _(block: Bullets) -> str:
    return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"


@_block.register
def _(block: Code) -> str:
    return f"<pre>{html.escape(block.text.strip())}</pre>"


@_block.register
def _(block: Table) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.head)
    rows = "\n".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


@_block.register
def _(block: Plot) -> str:
    wide, narrow = svg(block.draw(WIDE), f"{block.name}-wide"), svg(block.draw(1), f"{block.name}-narrow")
    label = html.escape(block.alt)
    return f'<figure aria-label="{label}"><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>'


@_block.register
def _(block: Photo) -> str:
    data = base64.b64encode(block.path.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(block.alt)}" src="data:image/png;base64,{data}"></figure>'


@_block.register
def _(block: Details) -> str:
    return f"<details><summary>{_inline(block.summary)}</summary>\n" + "\n".join(map(_block, block.blocks)) + "\n</details>"
