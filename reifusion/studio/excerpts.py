"""Excerpts of the code that draws: an equation, the lines that compute it, and where they stand.

Both are read from the code itself. An equation is a comment that begins with `# [id] source: …`; the
statement below it computes it.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
MOST = 14  # lines of an excerpt


@dataclass(frozen=True)
class Excerpt:
    equation: str  # with its source: "Eq. 4, Ho et al. 2020: q(xₜ | x₀) = …"; empty for code without one
    code: str
    place: str  # "reifusion/model/ddpm.py:181"


def excerpts(thing: Callable | type, *ids: str) -> list[Excerpt]:
    """Returns the equations in the source of a function or class: those with the ids, or all without ids."""
    lines, first = inspect.getsourcelines(thing)
    found, i = [], 0
    while i < len(lines):
        mark = re.match(r"(\s*)# \[([a-z][\w-]*)\] (.*)", lines[i])
        i += 1
        if mark is None or (ids and mark[2] not in ids):
            continue
        text = [mark[3]]
        while i < len(lines) and lines[i].strip().startswith("#"):
            text.append(lines[i].strip("# \n"))
            i += 1
        end = i  # the statements of this paragraph, at the equation's indentation or deeper
        while end < min(len(lines), i + MOST) and re.match(rf"{mark[1]}(?!# \[)\s*\S", lines[end]):
            end += 1
        found.append(_excerpt(thing, " ".join(text), lines[i:end], first + i))
    return found


def whole(thing: Callable) -> Excerpt:
    """Returns the source of a function, without what it says of itself, as far as there is room."""
    lines, first = inspect.getsourcelines(thing)
    lines = re.sub(r'\n +"""[\s\S]*?"""(?=\n)', "", "".join(lines), count=1).splitlines(keepends=True)
    more = ["    …\n"] if len(lines) > MOST else []
    return _excerpt(thing, "", lines[:MOST] + more, first)


def _excerpt(thing: Callable | type, equation: str, lines: list[str], line: int) -> Excerpt:
    path = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "").resolve()
    return Excerpt(
        equation, inspect.cleandoc("\n" + "".join(lines)), f"{path.relative_to(PACKAGE).as_posix()}:{line}"
    )


_MARKS = re.compile(
    r'(?P<text>"""[\s\S]*?(?:"""|$)|"[^"\n]*"|\'[^\'\n]*\')'
    r"|(?P<remark>#[^\n]*)"
    r"|(?P<number>\b\d[\d_.e]*\b)"
    rf"|\b(?P<word>{'|'.join(keyword.kwlist)})\b"
    r"|(?P<name>(?<=def )\w+|(?<=class )\w+)"
)


def coloured(code: str) -> str:
    """Returns Python as HTML: texts, remarks, numbers, keywords and defined names in `<i class=…>`."""
    parts, at = [], 0
    for mark in _MARKS.finditer(code):
        parts += [escape(code[at : mark.start()]), f'<i class="{mark.lastgroup}">{escape(mark[0])}</i>']
        at = mark.end()
    return "".join([*parts, escape(code[at:])])
