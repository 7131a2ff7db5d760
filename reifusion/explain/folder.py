"""Everything about one picture, in one folder, with a page to begin from."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from .. import album
from ..bar import Bar
from ..files import whole, write_text
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from . import web
from .figures import Exhibit, overlay
from .trace import Trace, trace
from .trajectory import Trajectory, describe, record
from .words import Attention, relative, watch


def explain(
    pipe: StableDiffusion,
    request: Request,
    folder: str | os.PathLike,
    entry: album.Entry,
    pixel: tuple[int, int] | None = None,
) -> None:
    """Draws the request's picture, watches, and fills a folder that exists; index.html shows the rest.

    entry: what picture.png says of itself. pixel: (x, y) of a place in the picture, to see what the place
    looks at. Raises ValueError for a request of several pictures or a pixel outside.
    """
    folder = Path(folder)
    with Bar(total=4, desc="the picture", unit="part", leave=False) as bar:
        with watch(pipe, request, pixel) as attention:
            trajectory = record(pipe, request)
        bar.set_description("its figures", refresh=False)
        bar.update()
        picture = trajectory.picture
        telling = attention.telling(5) or attention.special
        exhibits = {
            "film-strip": trajectory.strip(),
            "curves": trajectory.curves(),
            "words": attention.by_word(picture),
            "words-by-step": attention.by_step(picture, telling),
            "words-by-layer": attention.by_layer(picture, telling),
            "words-by-head": attention.by_head(picture, (attention.telling(1) or telling)[0]),
        }
        if pixel is not None:
            exhibits["pixel"] = attention.of_pixel(picture)
        for name, exhibit in exhibits.items():
            exhibit.save(folder / f"{name}.png")
        bar.set_description("its numbers", refresh=False)
        bar.update()
        album.save(picture, entry, folder / "picture.png")
        trajectory.animate(folder / "trajectory.gif")
        trajectory.save(folder)
        attention.save(folder)
        bar.set_description("what ran", refresh=False)
        bar.update()
        table = trace(pipe, request)
        table.save(folder)
        (folder / "words").mkdir(exist_ok=True)
        for k, word in enumerate(attention.words):
            with whole(folder / "words" / f"{k}.png") as temporary:
                overlay(picture, relative(attention.heat(word))).save(temporary, "PNG")
        write_text(folder / "index.html", page(trajectory, attention, table, exhibits))


def page(trajectory: Trajectory, attention: Attention, table: Trace, exhibits: dict[str, Exhibit]) -> str:
    """Returns the page that shows the files beside it."""
    prompt = escape(trajectory.request.prompts[0])
    words, overlays, rules = [], [], []
    for k, word in enumerate(attention.words):
        text = escape(word.text)
        words.append(f'<label><input type="radio" name="word" id="w{k}">{text}</label>')
        overlays.append(f'<img id="o{k}" src="words/{k}.png" alt="where the picture looked at “{text}”">')
        rules.append(f"#words:has(#w{k}:checked) #o{k}, #words:has(label:hover #w{k}) #o{k} {{ opacity: 1 }}")
    figures = {
        name: f'<figure><a href="{name}.png"><img src="{name}.png" alt="{escape(exhibit.alt)}"></a>'
        f"<figcaption>{escape(exhibit.guide)}</figcaption></figure>"
        for name, exhibit in exhibits.items()
    }
    forming = [figures.pop("film-strip"), figures.pop("curves")]
    networks = "".join(
        f"<tr><th scope='row'><a href='trace.html'>{row.name}</a></th><td>{row.parameters:,}</td>"
        f"<td>{row.flops / 1e9:,.2f}</td><td>{1e3 * row.seconds:,.1f}</td></tr>"
        for row in table.networks
    )
    side = trajectory.picture.width * (2 if trajectory.picture.width < 256 else 1)
    body = _BODY.format(
        prompt=prompt,
        about=escape(describe(trajectory.request)),
        steps=len(trajectory.t),
        words=" ".join(words),
        overlays="".join(overlays),
        forming="\n".join(forming),
        figures="\n".join(figures.values()),
        networks=networks,
    )
    style = "\n".join([_STYLE, f"body {{ --side: {side}px; }}", *rules, ""])
    return web.page(trajectory.request.prompts[0], style, body)


_STYLE = """
body { max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; --mark: light-dark(#fbe3d6, #5a2d18); }
h1 { margin-bottom: .2rem; }
h2 { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1.2rem; }
img { max-width: 100%; height: auto; vertical-align: top; }
figure { margin: 1.5rem 0; }
figure img { border-radius: 4px; }
figcaption { margin-top: .4rem; }
.pixels { image-rendering: pixelated; width: var(--side); }
.stage { position: relative; display: inline-block; }
.stage img + img, .stage img ~ img { position: absolute; inset: 0; opacity: 0; transition: opacity .15s; }
.stage img { width: var(--side); image-rendering: pixelated; }
label { font-size: 1.3rem; padding: .1rem .4rem; border-radius: 4px; cursor: pointer; }
label:hover, label:has(:checked), label:focus-within { background: var(--mark); }
label input { position: absolute; opacity: 0; }
td, th { padding: .15rem 1rem .15rem 0; }
th:first-child { text-align: left; }
thead th { color: var(--grey); }
"""

_BODY = """<h1>{prompt}</h1>
<p class="about">{about}</p>
<img class="pixels" src="picture.png" alt="the picture of “{prompt}”">
<h2>The picture forms</h2>
<p>{steps} times the network said what in the latents is noise and what is picture, and the sampler took some
of the noise away. Left, what it is given; right, the clean picture that it sees in it.</p>
<p><img src="trajectory.gif" alt="Left, noise becomes a picture; right, what the network sees in it."></p>
{forming}
<h2>Which word made which pixel</h2>
<p>Point at a word, or choose one with Tab and the arrow keys. Red is where the picture
looked at the word.</p>
<div id="words">
<p>{words}</p>
<div class="stage"><img src="picture.png" alt="the picture">{overlays}</div>
</div>
{figures}
<h2>What ran</h2>
<p>Every module in order, with shapes, arithmetic and time; each leads to the line of source that calls it:
<a href="trace.html">trace.html</a>. The U-Net's numbers are those of one of the {steps} steps.</p>
<table><thead><tr><th scope="col">network</th><th scope="col">parameters</th>
<th scope="col">GFLOP</th><th scope="col">ms</th></tr></thead><tbody>{networks}</tbody></table>
<h2>The numbers behind it</h2>
<p><a href="trajectory.safetensors">trajectory.safetensors</a> and <a href="trajectory.json">.json</a>: every
step's latents, noise and guidance. <a href="words.safetensors">words.safetensors</a> and
<a href="words.json">.json</a>: attention by layer, head, step and token. <a href="trace.json">trace.json</a>
and <a href="trace.txt">.txt</a>: the table.</p>
"""
