"""The table of modules: every call is there, its numbers are right, it leads to the line that makes it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reifusion import kernels
from reifusion.explain.trace import PACKAGE, Trace, own_flops, trace
from reifusion.model.attention import CrossAttention
from reifusion.model.request import Request

from .conftest import TINY, tiny

REQUEST = Request("a cat", "a dog", seed=1, cfg=3, sampler="ddim", steps=2)


@pytest.fixture(scope="module")
def table(pipe) -> Trace:
    return trace(pipe, REQUEST)


def test_every_module_that_runs_has_a_row_for_each_time_it_does(pipe, table):
    names = [row.name for row in table.rows]
    for network in ("clip", "diffusion", "decoder"):
        for path, module in pipe.models[network].named_modules():
            called = type(module).__name__ != "ModuleList"
            assert names.count(f"{network}.{path}".rstrip(".")) == called
    assert [row.name for row in table.networks] == ["clip", "diffusion", "decoder"]
    assert (
        names.index("diffusion.down.0.0")
        < names.index("diffusion.middle.0")
        < names.index("diffusion.up.0.0")
    )


def test_shapes_and_parameters(pipe, table):
    unet = table.networks[1]
    assert unet.takes == [[2, 4, 8, 8], [2, 40, 16], [1]] and unet.gives == [2, 4, 8, 8]
    for row in table.networks:
        assert row.parameters == sum(p.numel() for p in pipe.models[row.name].parameters())


def test_flops_are_those_that_pytorch_counts(pipe, table):
    tokens = torch.zeros(2, 40, dtype=torch.long)
    x, context, t = torch.zeros(2, 4, 8, 8), torch.zeros(2, 40, 16), torch.zeros(1)
    given = {"clip": (tokens,), "diffusion": (x, context, t), "decoder": (x[:1],)}
    for row in table.networks:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            pipe.models[row.name](*given[row.name])
        assert row.flops == counter.get_total_flops()


def test_attention_counts_two_products_of_pixels_words_and_width():
    layer, x, y = CrossAttention(2, 8, 6), torch.zeros(1, 10, 8), torch.zeros(1, 3, 6)
    assert own_flops(layer, (x, y), layer(x, y)) == 2 * (2 * 10 * 3 * 8)


def test_parts_add_up_to_the_whole(table):
    for network in table.networks:
        rows = [row for row in table.rows if row.name.split(".")[0] == network.name]
        assert sum(row.own_flops for row in rows) == network.flops
        assert sum(row.own_seconds for row in rows) == pytest.approx(network.seconds)
    assert sum(flops for _, _, flops, _ in table.kinds()) == sum(row.flops for row in table.networks)


def test_mean_and_std_are_those_of_what_the_module_gives(pipe, table):
    with torch.no_grad():
        out = pipe.models["clip"](
            torch.tensor([pipe.tokenizer.encode(p) for p in ("a cat", "a dog")])
        ).double()
    row = table.networks[0]
    assert row.mean == pytest.approx(out.mean().item(), abs=1e-6)
    assert row.std == pytest.approx(out.std(correction=0).item(), rel=1e-5)


def test_a_row_leads_to_the_line_that_makes_the_call(table):
    sources = {f"model/{path.name}": path.read_text().splitlines() for path in PACKAGE.glob("model/*.py")}
    checked = 0
    for row in table.rows:
        attribute = row.name.split(".")[-1]
        line = sources[row.source][row.line - 1]
        if row.depth and not attribute.isdigit() and attribute != "middle":
            assert f"self.{attribute}(" in line, (row.name, row.source, row.line)
            checked += 1
        elif not row.depth:
            assert "def forward(" in line or f"class {row.kind}" in line or line.startswith("    @")
    assert checked > 100


def test_rows_lead_to_the_textbook_also_where_fast_kernels_are_installed(table):
    fast = tiny()
    kernels.install(fast.models)
    rows = trace(fast, REQUEST).rows
    assert [(row.name, row.kind, row.source, row.line, row.flops) for row in rows] == [
        (row.name, row.kind, row.source, row.line, row.flops) for row in table.rows
    ]
    assert any(type(module) in kernels.PLAIN for module in fast.models["diffusion"].modules())


def test_nothing_is_left_hooked(pipe, table):
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks
        for network in pipe.models.values()
        for module in network.modules()
    )


def test_without_guidance_the_unet_sees_one_picture(pipe):
    table = trace(pipe, Request("a cat", seed=1, cfg=1))
    assert table.networks[1].takes[0] == [1, 4, 8, 8]


def test_a_unet_for_inpainting_can_be_traced():
    inpainting = tiny(replace(TINY, unet=replace(TINY.unet, in_channels=9)))
    assert trace(inpainting, REQUEST).networks[1].takes[0] == [2, 9, 8, 8]


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src"):
                self.links.append(value)
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_its_links_lead_somewhere(table):
    page = Page(table.html())
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert len(page.links) == len(table.rows) and {link[1:] for link in page.links} <= set(page.ids)
    assert (
        "http" not in re.sub(r"<pre>.*?</pre>", "", table.html(), flags=re.S)
        and "<script" not in table.html()
    )


def test_a_row_opens_to_the_rows_inside_it(table):
    html = table.html()
    inside = sum(one.depth < other.depth for one, other in pairwise(table.rows))
    assert html.count('<summary class="row') == inside > 20
    assert html.count("<details open>") == len(table.networks)
    assert html.count('<div class="row d') == len(table.rows) - inside


def test_the_files_say_the_same(table, tmp_path):
    table.save(tmp_path)
    rows = json.loads((tmp_path / "trace.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [row.name for row in table.rows]
    text = (tmp_path / "trace.txt").read_text()
    assert (
        len(text.splitlines()) == len(rows) + 3
        and "down.1.1.layers.0.cross_attention (CrossAttention)" in text
    )
