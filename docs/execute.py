"""Runs the code blocks of a page, once: what has not changed since it last succeeded is read from a cache.

    ```python exec="1" source="above" session="noise" text="1"

`exec` runs the block. Blocks with the same `session` share their names; without one, a block is alone.
`source="above"` shows the block above what it prints; without it, only that is shown. What is printed is
Markdown; with `html="1"` it is HTML, and with `text="1"` plain text. A picture is printed with
`docs.figures.show` in all three.

A listing shows what teaches and hides the plumbing: statements that import from `docs`, or that call `show`,
and statements that end in `# hidden`, however many lines they have.

The cache lies in `docs/.cache`. Its key is a hash of the blocks, of the sources of the package and of docs/,
of the mini, and of the versions of Python and PyTorch. A block that fails stops the build, and is not stored.
"""

from __future__ import annotations

import ast
import hashlib
import html
import importlib.metadata
import itertools
import json
import linecache
import re
import sys
import time
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from docs.figures import Figure
from reifusion.files import write_text

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "docs" / ".cache"
FENCE = re.compile(r'^```python (exec="1".*)\n((?:.*\n)*?)```$', re.M)
# What a block can reach. The build itself and the look of the pages are not among it.
REACH = (
    "reifusion/**/*",
    "docs/*.py",
    "docs/*.json",
    "docs/assets/*",
    "recipes/*",
    "bench/*.py",
    "bench/ablations.json",
    "bench/quality*.json",
    "demo.ipynb",
    "tests/model/*.json",
    "notebooks/*.ipynb",
)
BESIDE = {
    *("docs/build.py", "docs/live.py"),
    *(f"docs/assets/{name}" for name in ("book.css", "book.js", "live.mjs", "play.mjs", "theme.js")),
    *(f"docs/assets/{name}" for name in ("page.html", "source.html")),
}


class Failed(Exception):
    """A block raised an error; the message holds its traceback."""


@dataclass
class Block:
    options: dict[str, str]
    code: str
    place: str  # page and number, for messages

    def shown(self, printed: Sequence[str]) -> str:
        """Returns what the block prints, as HTML, or as Markdown if it has neither html nor text."""
        if "text" not in self.options:
            return "".join(printed)
        parts = []
        for figure, group in itertools.groupby(printed, lambda part: isinstance(part, Figure)):
            text = "".join(group)
            parts.append(text if figure else f'<pre class="printed">{html.escape(text.rstrip())}</pre>')
        return "\n".join(parts)


def blocks(page: str, markdown: str) -> list[Block]:
    """Returns the blocks of a page that are run."""
    return [
        Block(options(match[1]), match[2], f"{page}, block {number}")
        for number, match in enumerate(FENCE.finditer(markdown), 1)
    ]


def options(head: str) -> dict[str, str]:
    """Returns what stands behind ```python, as a dict."""
    return dict(re.findall(r'(\w+)="([^"]*)"', head))


def sessions(found: Sequence[Block]) -> list[list[Block]]:
    """Returns the blocks in groups that share their names."""
    groups: dict[str, list[Block]] = {}
    for block in found:
        groups.setdefault(block.options.get("session", block.place), []).append(block)
    return list(groups.values())


def listing(code: str) -> str:
    """Returns the code without its plumbing; of what is imported from `docs`, what the rest uses stays."""
    lines, used = code.splitlines(), set()
    for statement in reversed(ast.parse(code).body):
        first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
        if _plumbing(statement) or lines[last - 1].endswith("# hidden"):
            names = statement.names if isinstance(statement, ast.ImportFrom) else []
            needed = [alias.name for alias in names if (alias.asname or alias.name) in used]
            remark = lines[last - 1][len(lines[last - 1].partition("  #")[0]) :]
            kept = f"from {statement.module} import {', '.join(needed)}{remark}" if needed else None  # type: ignore[attr-defined]
            lines[first:last] = [kept] if kept else []
        else:
            used |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _plumbing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return (statement.module or "").partition(".")[0] == "docs"
    names = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
    return isinstance(statement, ast.Expr) and any(isinstance(n, ast.Name) and n.id == "show" for n in names)


def outputs(page: str, markdown: str) -> list[str]:
    """Returns what each block of the page prints; raises Failed if one fails."""
    found = blocks(page, markdown)
    printed = {b.place: text for group in sessions(found) for b, text in zip(group, _session(group))}
    return [printed[block.place] for block in found]


def _session(members: list[Block]) -> list[str]:
    stored = CACHE / f"{key(members)}.json"
    if stored.is_file():
        return json.loads(stored.read_text(encoding="utf-8"))
    module = types.ModuleType(f"block_{stored.stem[:12]}")
    sys.modules[module.__name__] = module  # where dataclasses look for their module
    texts = []
    try:
        for block in members:
            begun = time.perf_counter()
            texts.append(block.shown(_run(block, module)))
            print(f"{block.place}: {time.perf_counter() - begun:.1f} s", flush=True)
    finally:
        del sys.modules[module.__name__]
    CACHE.mkdir(exist_ok=True)
    write_text(stored, json.dumps(texts))
    return texts


def _run(block: Block, module: types.ModuleType) -> list[str]:
    printed: list[str] = []

    def collect(*things: object, sep: str = " ", end: str = "\n", **_: object) -> None:
        whole = len(things) == 1 and isinstance(things[0], Figure)
        printed.append(things[0] if whole else sep.join(map(str, things)) + end)  # type: ignore[arg-type]

    vars(module)["print"] = collect
    name = f"<{block.place}>"
    linecache.cache[name] = (len(block.code), None, block.code.splitlines(keepends=True), name)
    try:
        exec(compile(block.code, name, "exec"), vars(module))
    except Exception as error:
        raise Failed(f"{block.place} failed.\n{traceback.format_exc()}") from error
    return printed


def key(members: Sequence[Block]) -> str:
    """Returns the hash of all that the blocks' output is made of."""
    whole = hashlib.sha256(surroundings().encode())
    for block in members:
        whole.update(json.dumps([block.options, block.code]).encode())
    return whole.hexdigest()


@cache
def surroundings() -> str:
    """Returns the hash of all that a block can reach."""
    whole = hashlib.sha256(f"{sys.version} {importlib.metadata.version('torch')}".encode())
    for path in sorted(path for pattern in REACH for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and path.suffix != ".pyc" and name not in BESIDE:
            whole.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def forget(pages: dict[str, str]) -> None:
    """Removes from the cache what none of the pages (names to Markdown) needs any more."""
    kept = {key(group) for page, text in pages.items() for group in sessions(blocks(page, text))}
    for path in CACHE.glob("*.json"):
        if path.stem not in kept:
            path.unlink()
