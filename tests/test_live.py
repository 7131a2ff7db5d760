"""The page that draws has the same noise, tokens, steps and pictures as Python."""

import base64
import io
import json
import shutil
import subprocess
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import reifusion
from docs import build, execute, live
from reifusion.cli import book
from reifusion.explain.bugs import BUGS
from reifusion.explain.words import watch
from reifusion.model.config import ScheduleConfig
from reifusion.model.request import Request
from reifusion.model.samplers import SAMPLERS
from reifusion.model.tensors import TensorFile
from reifusion.model.tokenizer import Tokenizer
from reifusion.weights.writing import eight_bits

NODE = shutil.which("node")
SAMPLED = ("ddim", "euler", "euler_a", "dpmpp_2m_karras")
MERGES = "r e\nre d</w>\na p\nap p\nl e</w>\napp le</w>\nc a\nca t</w>\n' s</w>\ní n"


def run(code: str, given: object = None) -> Any:
    """Runs JavaScript with the exports of live.mjs as L; returns what `return` gives back."""
    if NODE is None:
        pytest.skip("JavaScript outside of a browser needs Node: apt-get install nodejs")
    module = (build.DOCS / "assets" / "live.mjs").as_uri()
    script = (
        f"import * as L from {json.dumps(module)}; const given = {json.dumps(given)};"
        f"console.log(JSON.stringify(await (async () => {{ {code} }})(), (key, value) =>"
        " ArrayBuffer.isView(value) ? [...value] : value))"
    )
    done = subprocess.run(
        [NODE, "--input-type=module", "-"], input=script, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_the_noise_is_pytorchs_and_goes_on_as_its_does(seed):
    generator = torch.Generator().manual_seed(seed)
    code = "const g = new L.Twister(given); return [g.normal(1024), g.normal(4096)]"
    for ours, count in zip(run(code, seed), (1024, 4096)):
        theirs = torch.randn(count, generator=generator)
        assert (torch.tensor(ours) - theirs).abs().max() < 2e-6


def test_the_tokens_are_the_tokenizers():
    tokenizer = Tokenizer(MERGES, 12)
    mini = {"merges": MERGES, "length": 12}
    mini |= {"start": tokenizer.start, "end": tokenizer.end, "pad": tokenizer.pad}
    texts = ["a red apple", "", "RED  Apples, 3½!", "a cat's ΣΊΝ", "naïve 🦊", "red " * 20, "it's\nfine\t42"]
    code = "const t = new L.Tokenizer(given.mini); return given.texts.map((text) => t.encode(text))"
    for text, found in zip(texts, run(code, {"mini": mini, "texts": texts})):
        with pytest.warns(UserWarning) if len(tokenizer.tokenize(text)) > 10 else _nothing():
            assert found["ids"] == tokenizer.encode(text)
        assert [place["word"] for place in found["places"]] == _words(tokenizer, text)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    pieces = tokenizer.pieces(text)[: tokenizer.context_length - 2]
    return [word for _, word in dict.fromkeys((piece.word_index, piece.word) for piece in pieces)]


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def drawn(name: str, steps: int, schedule: ScheduleConfig) -> torch.Tensor:
    """What the sampler makes of noise with a network that depends on what it is shown, and when."""
    generator = torch.Generator().manual_seed(5)
    sampler = SAMPLERS[name](generator, schedule)
    sampler.set_inference_timesteps(steps)
    x = sampler.init_noise_sigma * torch.randn(1, 4, 4, 4, generator=generator)
    for t in sampler.timesteps:
        x = sampler.step(t, x, torch.sin(3 * sampler.scale_model_input(x, t)) * (0.2 + t.item() / 2000))
    return x.flatten()


def drawn_by_javascript(name: str, steps: int, schedule: ScheduleConfig, bugs: tuple = ()) -> torch.Tensor:
    code = """
        const network = (seen, t) => Float32Array.from(seen, (v) => Math.sin(3 * v) * (0.2 + t / 2000));
        const networks = { clip: () => [], decoder: (x) => x,
            diffusion: (seen, words, t) => ({ output: network(seen, t), maps: new Float32Array(32) }) };
        const mini = { ...given.mini, merges: "", length: 2, side: 4 };
        const request = { ...given, prompt: "", seed: 5, scale: 1, bugs: new Set(given.bugs) };
        const loop = L.denoise(networks, mini, request);
        for (;;) {
            const { value, done } = await loop.next();
            if (done) return value.pixels;
        }
    """
    mini: dict[str, object] = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    mini["prediction"] = schedule.prediction_type
    return torch.tensor(run(code, {"mini": mini, "name": name, "steps": steps, "bugs": bugs}))


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("steps", [1, 7])
def test_the_steps_are_the_samplers(name, steps, prediction):
    schedule = ScheduleConfig(prediction_type=prediction)
    x = drawn(name, steps, schedule)
    assert (drawn_by_javascript(name, steps, schedule) - x).abs().max() < 1e-4 * x.abs().max()


AROUND = ("no-offset", "ddim-without-stride", "linear-betas", "noise-reused", "unscaled-start")


@pytest.mark.parametrize("bug", [*AROUND, "wrong-prediction-type"])
def test_a_bug_in_the_browser_is_the_famous_one(bug):
    schedule = ScheduleConfig(prediction_type="v_prediction")
    name = BUGS[bug].sampler
    with BUGS[bug].switched_on(SimpleNamespace(config=SimpleNamespace(schedule=schedule))):  # type: ignore[arg-type]
        wrong = drawn(name, 7, schedule)
    assert (wrong - drawn(name, 7, schedule)).abs().max() > 1e-3 * wrong.abs().max()
    ours = drawn_by_javascript(name, 7, schedule, (bug,))
    assert (ours - wrong).abs().max() < 1e-4 * wrong.abs().max()


# The whole, in a browser


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    pytest.importorskip("onnxscript", reason="the export needs: pip install reifusion[docs]")
    site = tmp_path_factory.mktemp("site")
    live.write(site / "live")
    if not (site / "live").is_dir():
        pytest.skip("onnxruntime-web could not be fetched from npm")
    shutil.copytree(build.DOCS / "assets", site / "assets")
    one = build.Page("play.md", "Draw here")
    build.render(one, execute.outputs("play.md", (build.DOCS / "play.md").read_text(encoding="utf-8")))
    build.write_page(site, one, [one])
    with book.served(site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/play.html")
        page.wait_for_selector("form:not([hidden])")
        page.site = site
        yield page
        assert wrong == []
        page.close()
        server.shutdown()


def draw(page: Any, bug: str = "", **fields: object) -> np.ndarray:
    for name, value in fields.items():
        if name == "name":
            page.select_option("select[name=name]", str(value))
        else:
            page.fill(f"input[name={name}]", str(value))
    for box in page.query_selector_all("input[name=bug]"):
        box.set_checked(box.get_attribute("value") == bug)
    page.evaluate("document.querySelector('.status').textContent = ''")
    page.click("form > button")
    page.wait_for_function(
        "/^(Done|It did)/.test(document.querySelector('.status').textContent)", timeout=120_000
    )
    assert page.inner_text(".status").startswith("Done"), page.inner_text(".status")
    return pixels(page)


def pixels(page: Any) -> np.ndarray:
    data = page.evaluate("document.querySelector('.picture').toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_the_weights_are_read_as_python_reads_them(tmp_path):
    generator = torch.Generator().manual_seed(5)
    matrix, kernel, vector = (torch.randn(size, generator=generator) for size in ((6, 4), (3, 2, 3, 3), (5,)))
    tensors = eight_bits({"clip.a": matrix, "diffusion.b": kernel}) | {
        "c": vector,
        "encoder.d": vector.bfloat16(),
    }
    assert tensors["diffusion.b"].dtype == torch.int8
    path = tmp_path / "small.safetensors"
    save_file(tensors, path)
    names = ["diffusion.b", "c", "clip.a", "encoder.d"]
    code = """const { readFile } = await import("node:fs/promises");
      const bytes = new Uint8Array(await readFile(given.path));
      return new Float32Array(L.readWeights(bytes.buffer, given.names).buffer)"""
    ours = torch.tensor(run(code, {"path": str(path), "names": names}))
    stored = TensorFile(path).tensors()
    assert torch.equal(ours, torch.cat([stored[name].read(dtype=torch.float32).flatten() for name in names]))


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("name", ["euler_a", "dpmpp_2m_karras"])
def test_the_picture_in_the_browser_is_pythons(page, name):
    pipe = reifusion.load(dtype="fp32", device="cpu")
    wanted: Any = {"seed": 3, "steps": 4}
    theirs: Any = pipe.generate("a red apple", sampler=name, cfg=4.0, progress=False, **wanted)
    ours = draw(page, prompt="a red apple", name=name, scale=4, **wanted)
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 2


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("bug", ["guidance-swapped", "wrong-scale", "truncated-pixels"])
def test_a_bug_in_the_browser_draws_pythons_picture_with_it(page, bug):
    pipe = reifusion.load(dtype="fp32", device="cpu")
    wanted: Any = {"seed": 3, "steps": 4}
    right, wrong = BUGS[bug].draw(pipe, "a red apple", **wanted)
    ours = draw(page, bug, prompt="a red apple", name=BUGS[bug].sampler, scale=4, **wanted)
    theirs = np.asarray(wrong).astype(int)
    assert (theirs != np.asarray(right)).any()
    # A level that is cut off may be the next one for a difference of nothing.
    assert np.abs(ours - theirs).max() <= 2 and np.abs(ours - theirs).mean() < 0.3


@pytest.mark.slow
@pytest.mark.browser
def test_a_word_lights_what_the_network_looked_at_for_it(page):
    pipe = reifusion.load(dtype="fp32", device="cpu")
    request = Request("a red apple", seed=3, steps=4, cfg=4.0, sampler="euler_a")
    with watch(pipe, request) as attention:
        list(pipe.denoise(request))
    plain = draw(page, prompt="a red apple", name="euler_a", seed=3, steps=4, scale=4)
    assert page.locator(".words button").all_inner_texts() == ["a", "red", "apple"]
    for number, word in enumerate(attention.words):
        page.locator(".words button").nth(number).focus()
        lit = pixels(page)[plain.min(-1) > 60].mean(-1) / plain[plain.min(-1) > 60].mean(-1)
        heat = attention.heat(word).numpy()[plain.min(-1) > 60]
        assert np.corrcoef(lit, heat)[0, 1] > 0.9
    assert lit.min() < 0.4  # it darkens the rest


@pytest.mark.slow
@pytest.mark.browser
def test_a_link_fills_in_the_form(page):
    page.goto(page.url.partition("?")[0] + "?prompt=a+cat&steps=5&bug=no-offset&name=ddim")
    page.wait_for_selector("form:not([hidden])")
    assert [page.input_value(f"[name={name}]") for name in ("prompt", "steps", "name")] == [
        "a cat",
        "5",
        "ddim",
    ]
    assert page.is_checked("[value=no-offset]") and not page.is_checked("[value=unscaled-start]")


@pytest.mark.slow
@pytest.mark.browser
def test_a_chapters_place_shows_what_the_chapter_is_about(page):
    words = '{{ live prompt="a cat" seed=9 steps=5 show="seed no-offset" }}'
    one = build.Page("book/one.md", "One")
    one.body = build._shorthands(one, words)
    address = page.url.partition("/play.html")[0]
    build.write_page(page.site, one, [one])
    page.goto(f"{address}/book/one.html")
    page.wait_for_selector("form:not([hidden])")
    shown = (
        "[...document.querySelectorAll('.live [data-field]')].filter((field) => field.offsetParent)"
        ".map((field) => field.dataset.field)"
    )
    assert page.evaluate(shown) == ["prompt", "seed", "no-offset"]
    assert [page.input_value(f"[name={name}]") for name in ("prompt", "seed", "steps")] == ["a cat", "9", "5"]
    page.click("button.more")
    assert len(page.evaluate(shown)) == 14
