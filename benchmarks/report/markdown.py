"""Write blocks as Markdown, as GitHub shows it, with the pictures beside it."""

import re
import shutil
from functools import singledispatch
from pathlib import Path

from report.blocks import Block, Bullets, Code, Details, Heading, Photo, Plot, Table, Text, Warn
from report.plot_style import save

SIDE_BY_SIDE = 2  # So many panels of a plot stand side by side.


def write_markdown(blocks: list[Block], path: Path, pictures: Path) -> None:
    """Write ``path``, and its pictures into the folder ``pictures``, at or below ``path``'s."""
    pictures.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(_block(block, pictures, pictures.relative_to(path.parent)) for block in blocks) + "\n")


def _safe(text: str) -> str:
    """Escape HTML. Our marks are Markdown's own."""
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text)


@singledispatch
def _block(block: Block, pictures: Path, link: Path) -> str:
    raise TypeError(f"block must be one of page.Block; got {type(block).__name__}")


@_block.register
def _(block: Heading, pictures: Path, link: Path) -> str:
    return f"{'#' * block.level} {_safe(block.text)}"


@_block.register
def _(block: Text, pictures: Path, link: Path) -> str:
    return _safe(block.text.strip())


@_block.register
def _(block: Warn, pictures: Path, link: Path) -> str:
    return f"> **{_safe(block.text.strip())}**"


@_block.register
def _(block: Bullets, pictures: Path, link: Path) -> str:
    return "\n".join(f"- {_safe(item)}" for item in block.items)


@_block.register
def _(block: Code, pictures: Path, link: Path) -> str:
    return f"```\n{block.text.strip()}\n```"


@_block.register
def _(block: Table, pictures: Path, link: Path) -> str:
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    return "\n".join("| " + " | ".join(_safe(cell) for cell in line) + " |" for line in lines)


@_block.register
def _(block: Plot, pictures: Path, link: Path) -> str:
    save(block.draw(SIDE_BY_SIDE), pictures / f"{block.name}.png")
    return f"![{_safe(block.alt)}]({link.joinpath(block.name + '.png').as_posix()})"


@_block.register
def _(block: Photo, pictures: Path, link: Path) -> str:
    if block.path.parent != pictures:
        shutil.copy(block.path, pictures)
    return f"![{_safe(block.alt)}]({link.joinpath(block.path.name).as_posix()})"


@_block.register
def _(block: Details, pictures: Path, link: Path) -> str:
    inner = "\n\n".join(_block(inside, pictures, link) for inside in block.blocks)
    return f"<details><summary>{_safe(block.summary)}</summary>\n\n{inner}\n\n</details>"
