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

from ..explain import web

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
    """Returns Python as HTML: texts, remarks, numbers, keywords and defined names in `<i class=…>`.

    Each line is whole by itself.
    """
    parts, at = [], 0
    for mark in _MARKS.finditer(code):
        pieces = (f'<i class="{mark.lastgroup}">{escape(one)}</i>' for one in mark[0].split("\n"))
        parts += [escape(code[at : mark.start()]), "\n".join(pieces)]
        at = mark.end()
    return "".join([*parts, escape(code[at:])])


def listing(name: str) -> str:
    """Returns a page with a file of the package, "reifusion/model/ddpm.py"; line 12 has the id L12.

    Raises ValueError for what is no Python of the package.
    """
    path = (PACKAGE / name).resolve()
    if PACKAGE / "reifusion" not in path.parents or path.suffix != ".py" or not path.is_file():
        raise ValueError(f"there is no file {name} in the package")
    lines = coloured(path.read_text("utf-8")).split("\n")
    numbered = "\n".join(f'<span id="L{k}"><b>{k:4}</b> {line}</span>' for k, line in enumerate(lines, 1))
    return web.page(name, _STYLE, f"<h1>{escape(name)}</h1>\n<pre>{numbered}</pre>")


_STYLE = """
body { margin: 1rem 1.5rem; } h1 { font: 600 16px ui-monospace, monospace; }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--grey); font-weight: 400; } pre i { font-style: normal; }
pre span { display: block; padding-left: 7ch; text-indent: -5ch; }
pre span:target { background: light-dark(#fff1b8, #4d431a); }
.word { color: light-dark(#8a1c9c, #e0a1f0); } .remark { color: light-dark(#5f6472, #98a0b3); }
.text { color: light-dark(#1b6b36, #8fd6a3); } .number { color: light-dark(#9a4a00, #ffb680); }
.name { color: light-dark(#1f4fb0, #9fc0ff); font-weight: 600; }
"""
