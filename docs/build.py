"""The parts of the book's build beyond Markdown: formulas, source excerpts, and pages of the source itself.

Loaded by MkDocs as a hook. In a chapter,

    $$ x_t = … \tag{forward} $$     is equation `forward`: numbered, rendered as MathML, without a script,
                                    with links to the line that computes it and the test that checks it
    {{ source reifusion.model.ddpm.Sampler.add_noise }}   is that function's current code, with a link
    {{ value reifusion.model.model_converter.TABLE }}     is the text of that constant
    [[reifusion/model/ddpm.py:forward]]   links to the line of equation `forward`; without `:…`, to the file
"""

from __future__ import annotations

import html
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from docs.equations import Equation, equations  # noqa: E402

_known: dict[str, Equation] = {}


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for every source file, each line with an anchor."""
    _known.update({equation.id: equation for equation in equations()})
    for path in sorted(
        p for part in ("reifusion/**", "bench", "tests/equations") for p in ROOT.glob(f"{part}/*.py")
    ):
        name = path.relative_to(ROOT).as_posix()
        files.append(
            File.generated(config, f"source/{name}.html", content=_source_page(name, path.read_text()))
        )
    return files


def _source_page(name: str, code: str) -> str:
    """Returns the file as a self-contained page: highlighted, also in dark mode, with numbered lines."""
    light, dark = HtmlFormatter(style="default"), HtmlFormatter(style="github-dark")
    body = highlight(
        code, PythonLexer(), HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
    )
    body = re.sub(r'(id|name|href)="(#?)L-(\d+)"', r'\1="\2L\3"', body)  # L-12 -> L12, as elsewhere
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{name}</title><style>
body {{ font-size: 15px; margin: 1rem; color-scheme: light dark }}
pre {{ overflow-x: auto; line-height: 1.45 }}
a {{ color: inherit; text-decoration: none }} h1 {{ font: 1.2rem sans-serif }} .linenos {{ opacity: .5 }}
a:target + span, a:target {{ background: #fc08 }}
{light.get_style_defs(".highlight")}
@media (prefers-color-scheme: dark) {{ body {{ background: #0d1117; color: #e6edf3 }}
{dark.get_style_defs(".highlight")} }}</style>
<h1><a href="{"../" * (name.count("/") + 1)}index.html">reifusion</a> · {name}</h1>{body}</html>"""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    up = "../" * page.file.src_uri.count("/")

    def excerpt(match: re.Match[str]) -> str:
        path, first, code = _find(match[1])
        link = f"[{path}, line {first}]({up}source/{path}.html#L{first})"
        return f"{link}{{.source}}\n\n```python\n{code}\n```\n"

    def link(match: re.Match[str]) -> str:
        path, _, target = match[1].partition(":")
        if not (ROOT / path).is_file():
            raise PluginError(f"{page.file.src_uri} links to {path}, which is not there")
        line = _equation(target, page).line if target else 0
        text = f"{path.removeprefix('reifusion/')}:{line}" if target else path.removeprefix("reifusion/")
        return f"[`{text}`]({up}source/{path}.html{f'#L{line}' if line else ''})"

    markdown = re.sub(
        r"^\{\{ value ([\w.]+) \}\}$", lambda m: f"```\n{_value(m[1])}\n```\n", markdown, flags=re.M
    )
    markdown = re.sub(r"^\{\{ source ([\w.]+) \}\}$", excerpt, markdown, flags=re.M)
    return re.sub(r"\[\[([\w/.]+\.py(?::[\w-]+)?)\]\]", link, markdown)


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
        thing = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)  # past decorators
        lines, first = inspect.getsourcelines(thing)
        path = Path(inspect.getsourcefile(thing) or "").relative_to(ROOT).as_posix()
        return path, max(1, first), textwrap.dedent("".join(lines)).rstrip()
    raise PluginError(f"there is no {name} to quote")


def _value(name: str) -> str:
    module, _, constant = name.rpartition(".")
    return str(getattr(importlib.import_module(module), constant)).strip()


def _equation(id: str, page: Any) -> Equation:
    if id not in _known:
        raise PluginError(f"{page.file.src_uri} speaks of equation {id}, which no chapter has")
    return _known[id]


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turns formulas into MathML; a numbered one gets an anchor, a number, and links to its line and test."""
    up = "../" * page.file.src_uri.count("/")

    def inline(match: re.Match[str]) -> str:
        return _mathml(match[1], "inline", page)

    def block(match: re.Match[str]) -> str:
        latex = match[1]
        tag = re.search(r"\\tag\{([\w-]+)\}", latex)
        if tag is None:
            return f'<div class="formula">{_mathml(latex, "block", page)}</div>'
        equation = _equation(tag[1], page)
        links = [
            f'<a href="{up}source/{equation.path}.html#L{equation.line}">{equation.place}</a>'
            if equation.path
            else "",
            f'<a href="{up}source/{equation.test_path}.html#L{equation.test_line}">test</a>'
            if equation.test_path
            else "",
        ]
        return (
            f'<div class="formula" id="eq-{equation.id}">{_mathml(latex.replace(tag[0], ""), "block", page)}'
            f'<p class="place">({equation.number}) {" · ".join(filter(None, links))}</p></div>'
        )

    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, content, flags=re.S)
    return re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', block, content, flags=re.S)


def _mathml(latex: str, display: str, page: Any) -> str:
    latex = html.unescape(latex).strip()
    try:
        return latex2mathml.converter.convert(latex, display=display)
    except Exception as error:  # the library raises many kinds
        raise PluginError(f"{page.file.src_uri}: cannot render {latex}: {error}") from error
