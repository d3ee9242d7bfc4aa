"""The default corpus, for when no file is given: Python's own documentation, in English, with the module as the label."""

import ast
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from .read import Document

# These modules are tests, programs, or the source of `topics`.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}


def default_corpus() -> Iterator[Document]:
    """Yield the language reference's topics as ``help()`` shows them, then every docstring of the standard library.

    The label is the top-level module, such as ``asyncio``, or ``pydoc_data.topics``; the origin is the module's full name, or
    the topic. The library is parsed, not imported.

    Raises:
        FileNotFoundError: as `library_files`.
    """
    for name in sorted(topics):
        yield Document(topics[name], "pydoc_data.topics", f"pydoc_data.topics:{name}")
    for file in library_files():
        parts = file.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for text, line in _docstrings(file):
            yield Document(text, parts[0], f"{module}:{line}")


def library_files() -> list[Path]:
    """Return the source files of the standard library, sorted.

    Raises:
        FileNotFoundError: this Python was installed without them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for name in sys.stdlib_module_names - LEFT_OUT for file in _sources(library, name))
    if not files:
        raise FileNotFoundError(f"{library} has no source of Python's library: give texts of your own")
    return files


def _sources(library: Path, name: str) -> list[Path]:
    if (file := library / f"{name}.py").is_file():
        return [file]
    return [file for file in (library / name).rglob("*.py") if not LEFT_OUT.intersection(file.relative_to(library).parts)]


def _docstrings(file: Path) -> Iterator[tuple[str, int]]:
    """Yield (docstring without its indentation, line) for the module, its classes and its functions."""
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text and text.strip():
                yield inspect.cleandoc(text), node.body[0].lineno
