"""The book: built once, read anywhere, and never with a failed claim in it."""

import json
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from docs import build, execute
from reifusion.cli import book
from reifusion.cli.main import main

PAGE = """# A page

```python exec="1" source="above" session="s" text="1"
from docs.figures import Figure
n = 3
print(n, "< 4")
```

```python exec="1" session="s" text="1"
print(n + 1)
print(Figure("<figure>a</figure>"))
```
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_blocks_of_a_session_share_their_names_and_their_text_is_escaped(cache):
    assert execute.outputs("p.md", PAGE) == [
        '<pre class="printed">3 &lt; 4</pre>',
        '<pre class="printed">4</pre>\n<figure>a</figure>',
    ]


def test_what_succeeded_is_not_run_again_until_something_changes(cache, capsys):
    first = execute.outputs("p.md", PAGE)
    assert "p.md, block 2" in capsys.readouterr().out
    assert execute.outputs("p.md", PAGE) == first and capsys.readouterr().out == ""
    assert execute.outputs("p.md", PAGE.replace("n = 3", "n = 5"))[1].startswith('<pre class="printed">6')
    assert "p.md, block 1" in capsys.readouterr().out


def test_a_change_of_the_package_runs_all_again(cache, capsys, monkeypatch):
    execute.outputs("p.md", PAGE)
    capsys.readouterr()
    monkeypatch.setattr(execute, "surroundings", lambda: "the package after a change")
    execute.outputs("p.md", PAGE)
    assert "p.md, block 1" in capsys.readouterr().out


def test_the_package_its_weights_and_the_figures_are_what_a_block_can_reach():
    reached = {path for pattern in execute.REACH for path in execute.ROOT.glob(pattern)}
    for name in ("reifusion/model/ddpm.py", "reifusion/data/mini.safetensors", "docs/figures.py"):
        assert execute.ROOT / name in reached and name not in execute.BESIDE


def test_a_failed_claim_stops_the_build_each_time_and_names_its_line(cache):
    wrong = PAGE.replace("print(n + 1)", 'assert n == 4, "n is four"')
    for _ in range(2):
        with pytest.raises(execute.Failed, match=r"p.md, block 2 failed[\s\S]*assert n == 4[\s\S]*n is four"):
            execute.outputs("p.md", wrong)
    assert list(cache.glob("*")) == []


def test_what_no_page_needs_leaves_the_cache(cache):
    execute.outputs("p.md", PAGE)
    execute.outputs("p.md", PAGE.replace("n = 3", "n = 5"))
    assert len(list(cache.glob("*.json"))) == 2
    execute.forget({"p.md": PAGE})
    (left,) = cache.glob("*.json")
    assert json.loads(left.read_text()) == execute.outputs("p.md", PAGE)


def test_a_listing_hides_its_plumbing():
    code = """
import torch
from docs.figures import show, strip

x = torch.zeros(3)  # hidden
y = [
    1,
]  # hidden
z = 2
print(
    show(
        strip([z]),
        "a picture",
    )
)
print("shown", z)
"""
    assert execute.listing(code) == 'import torch\n\nz = 2\nprint("shown", z)'


def test_a_listing_shows_where_the_names_in_it_come_from():
    code = """
from docs.figures import show, sketch, strip  # a face in four strokes
from docs.zork import LORA  # a file

x = sketch()
print(show(strip([x]), LORA))
"""
    wanted = "from docs.figures import sketch  # a face in four strokes\n\nx = sketch()"
    assert execute.listing(code) == wanted


def test_a_page_has_its_listing_its_output_and_its_formula(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "DOCS", tmp_path)
    quoted = "{{ source reifusion.model.clip.quick_gelu }}"
    text = f"{PAGE}\n## Next\n\n$x_t$ and\n\n$$ \\frac{{a}}{{b}} $$\n\n{quoted}\n"
    (tmp_path / "p.md").write_text(text)
    page = build.Page("p.md", "A page")
    build.render(page, execute.outputs("p.md", text))
    assert "docs.figures" not in page.body and "&lt; 4" in page.body and "<figure>a</figure>" in page.body
    assert page.body.count("<math") == 2 and 'href="source/reifusion/model/clip.py.html#L' in page.body
    assert page.headings == [("next", "Next")]


@pytest.mark.parametrize(
    ("link", "wrong"), [("b.html", "not there"), ("a.html#x", "no such place"), ("a.html#y", None)]
)
def test_every_link_is_checked(tmp_path, link, wrong):
    (tmp_path / "a.html").write_text(f'<p id="y"><a href="{link}">there</a></p>')
    found = build.broken(tmp_path)
    assert (wrong is None) == (found == []) and all(str(wrong) in sentence for sentence in found)


def test_every_page_is_in_the_contents_once():
    names = [page.name for page in build.contents()]
    files = {path.relative_to(build.DOCS).as_posix() for path in build.DOCS.rglob("*.md")}
    assert sorted(names) == sorted(files)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_cut_off_and_the_search_works_from_a_disk(browser, tmp_path, monkeypatch, width):
    long = f"numbers = {' + '.join(str(n) for n in range(100, 116))}  # {'x' * 20}"
    text = f"""# A page

```python
{long}
```

Text with {"a_very_long_name_" * 8} and $x_t = {" + ".join(f"x_{{{n}}}" for n in range(30))}$.

$$ {" + ".join(f"x_{{{n}}}" for n in range(40))} $$

| {" | ".join(f"`column_{n}`" for n in range(12))} |
|{"---|" * 12}
| {" | ".join("cell" for _ in range(12))} |

## Of swallows

They fly.
"""
    monkeypatch.setattr(build, "DOCS", tmp_path / "docs")
    shutil.copytree(execute.ROOT / "docs" / "assets", tmp_path / "docs" / "assets")
    shutil.copytree(tmp_path / "docs" / "assets", tmp_path / "site" / "assets")
    (tmp_path / "docs" / "p.md").write_text(text)
    page = build.Page("p.md", "A page")
    build.render(page, [])
    build.write_page(tmp_path / "site", page, [page])
    build.write_search(tmp_path / "site", [page])
    view = browser.new_page(viewport={"width": width, "height": 800})
    view.goto((tmp_path / "site" / "p.html").as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") == width
    for inside in ("pre", "p"):  # what wraps; formulas and tables scroll
        assert view.evaluate(f"[...document.querySelectorAll('main {inside}')]"
                             ".every(e => e.scrollWidth <= e.clientWidth + 1)")  # fmt: skip
    assert view.evaluate("document.querySelector('main .wide').scrollWidth") > 360
    view.fill(".search input", "swallows fly")
    view.wait_for_selector(".search li")
    assert view.get_attribute(".search li a", "href") == "p.html#of-swallows"
    view.click("button.theme")
    assert view.evaluate("document.documentElement.style.colorScheme") == "dark"
    view.close()


def test_what_cannot_be_rendered_stops_the_build():
    page = build.Page("p.md", "A page")
    with pytest.raises(build.Wrong, match=r"p\.md: \\lfloor cannot be rendered"):
        build._mathml(page, r"\Big\lfloor x \Big\rfloor", "block")
    with pytest.raises(build.Wrong, match=r"looks for equation guidance in reifusion/model/ddpm\.py"):
        build._shorthands(page, "[[reifusion/model/ddpm.py:guidance]]")


# `reifusion book`


def test_the_book_of_the_package_comes_before_that_of_a_clone(tmp_path, monkeypatch, capsys):
    data, clone = tmp_path / "data", tmp_path / "site"
    monkeypatch.setattr(book, "DATA", data)
    monkeypatch.setattr(book, "CLONE", clone)
    assert main(["book", "--no-browser"]) == 2 and "make docs" in capsys.readouterr().err
    for folder in (clone, data / "book"):
        folder.mkdir(parents=True)
        (folder / "index.html").write_text("<h1>The book</h1>")
        assert main(["book", "--no-browser"]) == 0
        assert capsys.readouterr().out == f"{folder / 'index.html'}\n"


def test_it_serves_pages_and_the_mini_and_nothing_above_them(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("<h1>The book</h1>")
    (site / "m.mjs").write_text("0")
    (tmp_path / "secret").write_text("no")
    (tmp_path / "mini.safetensors").write_text("weights")
    monkeypatch.setattr(book, "DATA", tmp_path)
    with book.served(site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"

        def get(path: str) -> tuple[str, str]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.read().decode(), answer.headers["Content-Type"]

        assert get("/") == ("<h1>The book</h1>", "text/html")
        assert get("/m.mjs")[1] == "text/javascript"
        assert get("/mini.safetensors")[0] == "weights"
        for path in ("/../secret", "/%2e%2e/secret"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(path)
        with pytest.raises(ValueError, match="another program"):
            book.served(site, port)
        server.shutdown()


def test_its_address_is_printed_and_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(book, "DATA", tmp_path)
    Path(tmp_path / "book").mkdir()
    Path(tmp_path / "book" / "index.html").write_text("")
    opened: list[str] = []

    def stop(address: str) -> None:
        opened.append(address)
        raise KeyboardInterrupt

    monkeypatch.setattr("webbrowser.open", stop)
    assert main(["book"]) == 0
    assert opened[0] in capsys.readouterr().out and opened[0].startswith("http://127.0.0.1:")
