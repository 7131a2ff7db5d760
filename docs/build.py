"""Builds the book: `python -m docs.build`, or `python -m docs.build book/toy.md` for some of its pages.

Pages are Markdown, in the order of contents.md; docs/execute.py runs their code blocks and says how a listing
hides its plumbing. In a page,

    $$ x_t = … \\tag{forward} $$     is equation `forward`: numbered, rendered as MathML, without a script,
                                    with links to the line that computes it and the test that checks it
    {{ source reifusion.model.ddpm.Sampler.add_noise }}   is that function's current code, with a link
    {{ value reifusion.model.model_converter.TABLE }}     is the text of that constant
    {{ file docs/assets/live.mjs denoise }}               is that function of a file in JavaScript
    {{ live prompt="a cat" steps=8 show="seed no-offset" }}   is a place where the reader draws with the mini:
                                    with these settings, and of the fields and bugs at first only these
    [[reifusion/model/ddpm.py:forward]]   links to the line of equation `forward`; without `:…`, to the file

The result is plain files in site/ that open from a disk. Every link in it is checked.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import hashlib
import html
import importlib
import inspect
import json
import multiprocessing
import os
import re
import shlex
import shutil
import string
import sys
import textwrap
import time
import urllib.parse
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import latex2mathml.converter
import markdown
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from docs import execute, live
from docs.equations import Equation, equations

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXTENSIONS = [
    *("admonition", "attr_list", "footnotes", "tables", "toc"),
    *("pymdownx.details", "pymdownx.highlight", "pymdownx.superfences", "pymdownx.arithmatex"),
]
SETTINGS = {
    "toc": {"permalink": "¶"},
    "pymdownx.arithmatex": {"generic": True},
    "pymdownx.highlight": {"line_spans": "line"},  # so that a line that wraps knows where it began
}
ASSETS = (".css", ".js", ".mjs", ".png", ".jpg", ".svg")


class Wrong(Exception):
    """The book says something that cannot be built; the message says what."""


@dataclass
class Page:
    """A page of the book: where its Markdown is (`book/toy.md`), its title, and the part that it is in."""

    name: str
    title: str
    part: str = ""
    body: str = ""
    headings: list[tuple[str, str]] = field(default_factory=list)  # id and text, of second level

    @property
    def address(self) -> str:
        return self.name.removesuffix(".md") + ".html"

    @property
    def up(self) -> str:
        """The way to the root of the site."""
        return "../" * self.name.count("/")


def contents() -> list[Page]:
    """Returns the pages in the order of contents.md."""
    pages, part = [], ""
    for line in (DOCS / "contents.md").read_text(encoding="utf-8").splitlines():
        if item := re.match(r"( *)- \[(.+)\]\((.+\.md)\)", line):
            pages.append(Page(item[3], html.escape(item[2]), part if item[1] else ""))
        elif item := re.match(r"- (.+)", line):
            part = item[1]
    return [*pages, Page("contents.md", "Contents")]


# From Markdown to HTML


def render(page: Page, printed: list[str]) -> None:
    """Fills in the page's body and headings; printed is what its blocks print."""
    text = (DOCS / page.name).read_text(encoding="utf-8")
    raw: list[str] = []

    def block(match: re.Match[str]) -> str:
        options, number = execute.options(match[1]), len(raw)
        raw.append(printed[number])
        shown = f"```python\n{execute.listing(match[2])}\n```\n\n" if options.get("source") == "above" else ""
        as_it_is = "html" not in options and "text" not in options
        return shown + (printed[number] if as_it_is else f'<div id="printed-{number}"></div>')

    text = _shorthands(page, execute.FENCE.sub(block, text))
    body = markdown.Markdown(extensions=EXTENSIONS, extension_configs=SETTINGS).convert(text)
    for number, output in enumerate(raw):
        body = body.replace(f'<div id="printed-{number}"></div>', f'<div class="printed">{output}</div>')
    body = re.sub(r"<table>.*?</table>", r'<div class="table">\g<0></div>', body, flags=re.S)
    body = re.sub(r'href="([^":]+)\.md([?#][^"]*)?"', r'href="\1.html\2"', body)
    page.body = _formulas(page, body)
    for id, heading in re.findall(r"<h2 id=[\"'](.+?)[\"']>(.*?)</h2>", page.body, flags=re.S):
        page.headings.append((id, _text(re.sub(r'<a class="headerlink".*?</a>', "", heading))))


def _text(body: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))).strip()


def _shorthands(page: Page, text: str) -> str:
    def excerpt(match: re.Match[str]) -> str:
        path, first, code = _find(match[1])
        link = f"[{path}, line {first}]({page.up}source/{path}.html#L{first})"
        return f"{link}{{.source}}\n\n```python\n{code}\n```\n"

    def link(match: re.Match[str]) -> str:
        path, _, target = match[1].partition(":")
        if not (ROOT / path).is_file():
            raise Wrong(f"{page.name} links to {path}, which is not there")
        if target and _equation(page, target).path != path:
            raise Wrong(f"{page.name} looks for equation {target} in {path}, where it is not")
        line = _equation(page, target).line if target else 0
        shown = f"{path.removeprefix('reifusion/')}:{line}" if target else path.removeprefix("reifusion/")
        return f"[`{shown}`]({page.up}source/{path}.html{f'#L{line}' if line else ''})"

    def script(match: re.Match[str]) -> str:
        code = (ROOT / match[1]).read_text(encoding="utf-8")
        found = re.search(rf"^(?:export )?(?:async )?function\*? {match[2]}\(.*?^\}}$", code, re.M | re.S)
        if found is None:
            raise Wrong(f"{page.name} quotes {match[2]} of {match[1]}, which is not there")
        line, address = code[: found.start()].count("\n") + 1, match[1].removeprefix("docs/")
        return f"[{match[1]}, line {line}]({page.up}{address}){{.source}}\n\n```js\n{found[0]}\n```\n"

    def live_place(match: re.Match[str]) -> str:
        wish = urllib.parse.urlencode(dict(part.split("=", 1) for part in shlex.split(match[1])))
        place = (DOCS / "assets" / "live.html").read_text(encoding="utf-8")
        return string.Template(place).substitute(wish=html.escape(wish), up=page.up)

    text = re.sub(r"^\{\{ live (.*?) ?\}\}$", live_place, text, flags=re.M)
    text = re.sub(r"^\{\{ file ([\w/.]+) (\w+) \}\}$", script, text, flags=re.M)
    text = re.sub(r"^\{\{ value ([\w.]+) \}\}$", lambda m: f"```\n{_value(m[1])}\n```\n", text, flags=re.M)
    text = re.sub(r"^\{\{ source ([\w.]+) \}\}$", excerpt, text, flags=re.M)
    return re.sub(r"\[\[([\w/.]+\.py(?::[\w-]+)?)\]\]", link, text)


def _find(name: str) -> tuple[str, int, str]:
    """Returns the file, first line and code of a dotted name."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            thing = getattr(thing, part)
        code: Any = thing.fget if isinstance(thing, property) else thing
        thing = inspect.unwrap(code)  # past decorators
        lines, first = inspect.getsourcelines(thing)
        path = Path(inspect.getsourcefile(thing) or "").relative_to(ROOT).as_posix()
        return path, max(1, first), textwrap.dedent("".join(lines)).rstrip()
    raise Wrong(f"there is no {name} to quote")


def _value(name: str) -> str:
    module, _, constant = name.rpartition(".")
    return str(getattr(importlib.import_module(module), constant)).strip()


@cache
def _known() -> dict[str, Equation]:
    return {equation.id: equation for equation in equations()}


def _equation(page: Page, id: str) -> Equation:
    if id not in _known():
        raise Wrong(f"{page.name} speaks of equation {id}, which no chapter has")
    return _known()[id]


def _formulas(page: Page, body: str) -> str:
    """Turns formulas into MathML; a numbered one gets an anchor, a number, and links to its line and test."""

    def inline(match: re.Match[str]) -> str:
        return _mathml(page, match[1], "inline")

    def block(match: re.Match[str]) -> str:
        latex = match[1]
        tag = re.search(r"\\tag\{([\w-]+)\}", latex)
        if tag is None:
            return f'<div class="formula"><div class="wide">{_mathml(page, latex, "block")}</div></div>'
        equation = _equation(page, tag[1])
        links = [
            f'<a href="{page.up}source/{path}.html#L{line}">{shown}</a>'
            for path, line, shown in (
                (equation.path, equation.line, equation.place),
                (equation.test_path, equation.test_line, "test"),
            )
            if path
        ]
        formula = _mathml(page, latex.replace(tag[0], ""), "block")
        return (
            f'<div class="formula" id="eq-{equation.id}"><div class="wide">{formula}</div>'
            f'<p class="place">({equation.number}) {" · ".join(links)}</p></div>'
        )

    body = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, body, flags=re.S)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, body, flags=re.S)


def _mathml(page: Page, latex: str, display: str) -> str:
    latex = html.unescape(latex).strip()
    try:
        formula = latex2mathml.converter.convert(latex, display=display)
    except Exception as error:  # the library raises many kinds
        raise Wrong(f"{page.name}: cannot render {latex}: {error}") from error
    if left := re.search(r"\\\w+", formula):
        raise Wrong(f"{page.name}: {left[0]} cannot be rendered, in {latex}")
    # Raised once more, a prime would be a speck: its sign is small and high already.
    return re.sub(
        r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>",
        r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>',
        formula,
    )


# From HTML to files


def write(out: Path, address: str, text: str) -> None:
    path = out / address
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_page(out: Path, page: Page, pages: list[Page]) -> None:
    """Writes the page between its contents and its neighbours; pictures become files."""
    frame = string.Template((DOCS / "assets" / "page.html").read_text(encoding="utf-8"))
    at = pages.index(page)
    ways = [
        f'<a rel="{rel}" href="{page.up}{pages[to].address}"><span>{way}</span>{pages[to].title}</a>'
        for rel, way, to in (("prev", "back", at - 1), ("next", "on", at + 1))
        if 0 <= to < len(pages)
    ]

    def picture(match: re.Match[str]) -> str:
        data = base64.b64decode(match[2])
        name = f"assets/figures/{hashlib.sha256(data).hexdigest()[:16]}.{match[1].partition('+')[0]}"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
        return f'src="{page.up}{name}"'

    body = re.sub(r'src="data:image/([\w+]+);base64,([^"]+)"', picture, page.body)
    filled = {"title": page.title, "up": page.up, "contents": _contents(page, pages), "body": body}
    write(out, page.address, frame.substitute(filled, ways="".join(ways)))


def _contents(page: Page, pages: list[Page]) -> str:
    """Returns the list of all pages; the one that is open unfolds its headings."""
    items, part = [], ""
    for other in pages:
        if other.part != part:
            part = other.part
            items.append(f'<li class="part">{part}</li>' if part else '<li class="part"></li>')
        inside = "".join(f'<li><a href="#{id}">{html.escape(text)}</a></li>' for id, text in other.headings)
        here = ' aria-current="page"' if other is page else ""
        items.append(
            f'<li><a href="{page.up}{other.address}"{here}>{other.title}</a>'
            f"{f'<ul>{inside}</ul>' if here and inside else ''}</li>"
        )
    return f"<ul>{''.join(items)}</ul>"


def write_sources(out: Path) -> None:
    """Writes a page for every source file: highlighted, each line with an anchor."""
    frame = string.Template((DOCS / "assets" / "source.html").read_text(encoding="utf-8"))
    look = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
    for part in ("reifusion/**", "bench", "tests/equations", "docs"):
        for path in ROOT.glob(f"{part}/*.py"):
            name = path.relative_to(ROOT).as_posix()
            body = highlight(path.read_text(encoding="utf-8"), PythonLexer(), look)
            body = re.sub(r'(id|name|href)="(#?)L-(\d+)"', r'\1="\2L\3"', body)  # L-12 -> L12, as elsewhere
            up = "../" * (name.count("/") + 1)
            write(out, f"source/{name}.html", frame.substitute(name=name, up=up, body=body))


def write_search(out: Path, pages: list[Page]) -> None:
    """Writes what the search looks through: page, heading, address and text of every section."""
    rows = []
    for page in pages:
        body = re.sub(r"<(math|pre|svg)\b.*?</\1>", " ", page.body, flags=re.S)
        for section in re.split(r"(?=<h2 id=)", body):
            head = re.match(r"<h2 id=[\"'](.+?)[\"']>(.*?)</h2>", section, flags=re.S)
            heading = re.sub(r'<a class="headerlink".*?</a>', "", head[2]) if head else ""
            rows.append(
                (page.title, _text(heading), page.address + (f"#{head[1]}" if head else ""), _text(section))
            )
    write(out, "assets/search.js", f"searchable({json.dumps(rows, ensure_ascii=False)})\n")


def broken(out: Path) -> list[str]:
    """Returns a sentence for each link in the site that leads nowhere."""
    texts = {path: path.read_text(encoding="utf-8") for path in out.rglob("*.html")}
    anchors = {
        path: set(re.findall(r"\b(?:id|name)=[\"']([^\"']+)[\"']", text)) for path, text in texts.items()
    }
    wrong = []
    for path, text in texts.items():
        for link in sorted(set(re.findall(r"<\w[^<>]*? (?:href|src)=[\"']([^\"':]+)[\"']", text))):
            address, _, anchor = html.unescape(link).partition("#")
            target = (path.parent / address.partition("?")[0]).resolve() if address else path
            if not target.is_file():
                wrong.append(f"{path.relative_to(out)} links to {link}, which is not there")
            elif anchor and anchor not in anchors.get(target, {anchor}):
                wrong.append(f"{path.relative_to(out)} links to {link}, and there is no such place")
    return wrong


def build(names: list[str], out: Path) -> None:
    """Builds the pages of these names, all if there are none; raises Wrong or execute.Failed."""
    begun, pages = time.perf_counter(), contents()
    if unknown := set(names) - {page.name for page in pages}:
        raise Wrong(f"contents.md has no page {', '.join(sorted(unknown))}")
    texts = {page.name: (DOCS / page.name).read_text(encoding="utf-8") for page in pages}
    wanted = [page for page in pages if not names or page.name in names]
    mark = out / "assets" / "book.css"  # of all that is written here, the first
    if out.exists() and not mark.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise Wrong(f"{out} is no book, so it was left as it is; take a new folder")
    shutil.rmtree(out, ignore_errors=True)
    mark.parent.mkdir(parents=True)
    shutil.copy(DOCS / "assets" / mark.name, mark)
    for path in DOCS.glob("assets/*"):
        if path.suffix in ASSETS:
            (out / "assets").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / "assets")
    # The longest first, on all cores; each with one thread, so that they do not wait for one another.
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        order = sorted(wanted, key=lambda page: -len(execute.blocks(page.name, texts[page.name])))
        running = {page.name: pool.submit(execute.outputs, page.name, texts[page.name]) for page in order}
        try:
            for page in wanted:
                render(page, running[page.name].result())
                print(page.name, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for page in wanted:
        write_page(out, page, pages)
    write_search(out, wanted)
    if any("{{ live" in texts[page.name] for page in wanted):
        print("the networks for the browser", flush=True)
        live.write(out / "live")
    print("the pages of the source", flush=True)
    write_sources(out)
    if not names:
        execute.forget(texts)
        if wrong := broken(out):
            raise Wrong("\n".join(wrong))
    print(f"{out.name}/index.html, in {time.perf_counter() - begun:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the book into site/.")
    parser.add_argument(
        "pages", nargs="*", help="only these, such as book/toy.md; links are not checked then"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    arguments = parser.parse_args()
    try:
        build(arguments.pages, arguments.out.resolve())
    except (Wrong, execute.Failed, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
