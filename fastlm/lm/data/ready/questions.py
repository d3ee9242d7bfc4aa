"""Questions on Python's own documentation, with the answers as they stand in it: made by rules, from local source files."""

import ast
import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..clean import clean
from ..default_corpus import library_files

LONGEST = 600  # characters of a context
_RETURNS = re.compile(r"\bReturns? (?!if\b|from\b|whether\b)([^.]{8,120}?)(?:\.(?=\s|$)|$)")
_RAISES = re.compile(
    r"\b(?:[Rr]aises?|[Tt]hrows?) (?:an? )?(?P<error>\w+(?:Error|Exception|Exit|Interrupt))\b,? "
    r"(?:if|when) (?P<when>[^.]{6,120}?)(?:\.(?=\s|$)|$)"
)


class Question(NamedTuple):
    """A question on a context, and the answer, which stands in the context at the character ``start``."""

    question: str
    context: str
    answer: str
    start: int


def documented_questions() -> Iterator[Question]:
    """Yield questions on the functions of the standard library.

    A context is the signature of a function, and the first paragraph of its docstring or the one that the answer is in. The
    questions are about defaults of arguments, what is returned, which exception is raised, and when.

    Raises:
        FileNotFoundError: as `fastlm.lm.data.default_corpus.library_files`.
    """
    for file in library_files():
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _questions_on(node)


def _questions_on(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Question]:
    doc = ast.get_docstring(node, clean=False)
    if not doc or not doc.strip():
        return
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(doc).split("\n\n")]
    name, signature = node.name, f"{node.name}({ast.unparse(node.args)})"
    for paragraph in paragraphs:
        context = f"{signature} {paragraph}"
        if len(context) > LONGEST or clean(context) != context:
            continue
        if paragraph is paragraphs[0]:
            yield from _defaults(node, context)
        found = [(f"What does {name} return?", match.span(1)) for match in _RETURNS.finditer(context)][:1]
        for match in _RAISES.finditer(context):
            found.append((f"When does {name} raise {match['error']}?", match.span("when")))
            found.append((f"What does {name} raise if {match['when']}?", match.span("error")))
        for question, (start, end) in found:
            yield Question(question, context, context[start:end], start)


def _defaults(node: ast.FunctionDef | ast.AsyncFunctionDef, context: str) -> Iterator[Question]:
    """Yield a question on each default of a signature with which ``context`` begins."""
    arguments = node.args
    pairs = list(zip([*arguments.posonlyargs, *arguments.args][::-1], arguments.defaults[::-1]))
    pairs += [pair for pair in zip(arguments.kwonlyargs, arguments.kw_defaults) if pair[1] is not None]
    for argument, default in pairs:
        value = ast.unparse(default)
        if found := re.search(rf"[(\s]{re.escape(argument.arg)}(?:: [^=,]+ ?)?= ?({re.escape(value)})", context):
            yield Question(f"What is the default of {argument.arg} in {node.name}?", context, value, found.start(1))
