"""The studio in a real Chromium, drawing with the mini. Screenshots go to $REIFUSION_ARTIFACTS."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reifusion import cli
from reifusion.model.config import MINI
from reifusion.model.request import Request

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = [pytest.mark.browser, pytest.mark.slow]

AUDIT = (Path(__file__).parent / "audit.js").read_text("utf-8")
# How dark the canvas over the picture is on average, and how brightly each word is lit, from 0 to 1.
SHADE = """() => { const c = document.querySelector('#view canvas');
    if (!c.width || !c.height) return 0;
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    return d.filter((_, i) => i % 4 === 3).reduce((a, b) => a + b, 0) / (d.length / 4); }"""
LIT = (
    "() => [...document.querySelectorAll('#view .word')].map(w => Number(w.style.getPropertyValue('--lit')))"
)

DEFAULT: Any = {"sampler": MINI.sampler, "cfg": MINI.cfg}


def fill(page: Any, **fields: object) -> None:
    for name, value in fields.items():
        page.locator(f"#{name} :is(textarea, input:not([type=range]))").first.fill(str(value))
        page.keyboard.press("Tab")


def draw(page: Any, **fields: object) -> Path:
    """Draws in a page to the end; returns the picture's file."""
    fill(page, **{"steps": 4, "seed": 3} | fields)
    before = page.inner_text("#status .says")
    page.click("#draw")
    page.wait_for_function("old => document.querySelector('#status .says').innerText !== old", arg=before)
    return drawn(page)


def drawn(page: Any) -> Path:
    wait(page, "^Done")
    page.wait_for_selector("#view .word")
    return Path(page.inner_text("#status .says").removeprefix("Done: "))


def wait(page: Any, status: str) -> None:
    page.wait_for_function(
        "status => RegExp(status).test(document.querySelector('#status .says').innerText)", arg=status
    )


def carried_by(path: Path) -> dict[str, Any]:
    picture: Any = Image.open(path)
    return json.loads(picture.text["reifusion"])


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def value(page: Any, name: str) -> str:
    return page.locator(f"#{name} :is(textarea, input)").first.input_value()


def scrub(page: Any, key: str) -> str:
    """Moves the step slider by keyboard; returns the caption that then appears."""
    before = page.inner_text("#view figcaption b")
    page.focus("#place input[type=range]")
    page.keyboard.press(key)
    page.wait_for_function(
        "old => document.querySelector('#view figcaption b').innerText !== old", arg=before
    )
    return page.inner_text("#view figcaption b")


@pytest.fixture(scope="module")
def apple(lasting_tab) -> Any:
    """A page in which a red apple was drawn, in four steps. Tests only look at it."""
    page = lasting_tab()
    draw(page, prompt="a red apple")
    return page


def test_a_picture_forms_step_by_step(open_tab):
    page = open_tab()
    page.evaluate("""() => { window.seen = new Set(); new MutationObserver(() => {
        const image = document.querySelector('#view img'); if (image) window.seen.add(image.src);
    }).observe(document.body, {subtree: true, childList: true, attributes: true}); }""")
    carried = carried_by(draw(page, prompt="a red apple", steps=10))
    assert page.evaluate("window.seen.size") > 3  # the noise, at least some of the steps, the picture
    assert (carried["prompt"], carried["seed"], carried["steps"]) == ("a red apple", 3, 10)


def test_words_light_up_pixels_and_pixels_words_by_mouse_and_by_keyboard(apple):
    word, picture = apple.locator("#view .word").nth(2), apple.locator("#view .canvas")
    apple.hover("h1")
    assert apple.evaluate(SHADE) == 0
    word.hover()
    assert apple.evaluate(SHADE) > 5 and apple.evaluate(LIT) == [0, 0, 1]
    apple.hover("h1")
    assert apple.evaluate(SHADE) == 0 and max(apple.evaluate(LIT)) == 0
    word.focus()
    assert apple.evaluate(SHADE) > 5 and apple.evaluate(LIT) == [0, 0, 1]
    apple.evaluate("document.activeElement.blur()")
    assert apple.evaluate(SHADE) == 0
    picture.scroll_into_view_if_needed()
    box, lit = picture.bounding_box(), set()
    for x, y in [(0.1, 0.1), (0.5, 0.5), (0.9, 0.5), (0.5, 0.9), (0.3, 0.6)]:
        apple.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        lit.add(tuple(apple.evaluate(LIT)))
        assert apple.inner_text("#view .here").startswith("Here: ")
    assert len(lit) > 2 and max(map(max, lit)) > 0
    apple.hover("h1")
    picture.focus()
    apple.keyboard.press("ArrowRight")
    assert apple.get_attribute("#view .view", "data-place") == "0.56,0.50"


def test_scrubbing_goes_through_the_steps_with_marker_and_equations(apple):
    where = lambda: apple.get_attribute("#schedule .marker", "d")  # noqa: E731
    assert scrub(apple, "Home") == "the noise it began with" and apple.locator("#view .word").count() == 0
    begin = where()
    assert scrub(apple, "End") == "the picture"
    apple.wait_for_function("document.querySelector('#happens').innerText.includes('picture is decoded')")
    assert where() != begin
    assert scrub(apple, "ArrowLeft").startswith("step 4 of 4, t = ")
    apple.wait_for_function("document.querySelector('#happens').innerText.includes('Ho & Salimans 2022')")
    assert "reifusion/model/guidance.py:" in apple.inner_text("#happens")
    assert scrub(apple, "End") == "the picture"


def test_the_copied_command_and_python_repeat_the_picture_exactly(apple, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    apple.context.grant_permissions(["clipboard-read", "clipboard-write"])
    copied = []
    for button in ("#copy-command", "#copy-python"):
        apple.evaluate("navigator.clipboard.writeText('nothing yet')")
        apple.click(button)
        apple.wait_for_function("async () => await navigator.clipboard.readText() !== 'nothing yet'")
        copied.append(apple.evaluate("navigator.clipboard.readText()"))
    wait(apple, "^Copied")
    words = shlex.split(copied[0])
    assert words[0] == "reifusion" and cli.main([*words[1:2], "--out=again.png", *words[2:]]) == 0
    exec(compile(copied[1], "copied", "exec"), {})
    settings = carried_by(Path("again.png"))
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a red apple", 3, 4)
    shown = apple.get_attribute("#strip img", "src")
    Path("shown.png").write_bytes(apple.request.get(shown).body())
    assert np.array_equal(pixels("again.png"), pixels("shown.png"))
    assert np.array_equal(pixels("picture.png"), pixels("shown.png"))


def test_it_can_be_read_on_a_wall_and_on_a_phone_by_day_and_by_night(apple, artifacts):
    for title in ("Begin with a picture", "Another model", "Gallery: "):
        apple.get_by_text(title).click()
    apple.wait_for_selector("#shelf img")
    apple.locator("#shelf button:has(img)").first.click()
    apple.wait_for_selector("#facts dl")
    apple.click("#reuse")
    for scheme in ("light", "dark"):
        apple.emulate_media(color_scheme=scheme)
        apple.wait_for_function(
            f"document.body.classList.contains('dark') === {str(scheme == 'dark').lower()}"
        )
        for width, height in ((1280, 900), (360, 740)):
            apple.set_viewport_size({"width": width, "height": height})
            apple.wait_for_function(f"document.documentElement.clientWidth === {width}")
            apple.evaluate("window.scrollTo(0, 0)")
            apple.screenshot(path=artifacts / f"studio-{width}-{scheme}.png", full_page=True)
            apple.locator("#view .word").nth(2).hover()
            apple.screenshot(path=artifacts / f"studio-{width}-{scheme}-word.png")
            faults = apple.evaluate(AUDIT)
            assert faults == [], "\n".join([f"{width} px, {scheme}:", *faults])


def test_only_what_is_painted_changes(open_tab, artifacts):
    page = open_tab()
    before = pixels(draw(page, prompt="a red apple"))
    page.get_by_text("Begin with a picture").click()
    page.click("#reuse")
    canvas = page.locator("#editor canvas").first
    canvas.hover()
    page.wait_for_timeout(1500)  # the editor lays the picture out some time after it has it
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 12, middle[1] + 8, steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)  # … and reports what was painted some time after
    page.screenshot(path=artifacts / "studio-mask.png")
    path = draw(page, prompt="a blue fish", seed=4)
    carried, after = carried_by(path), pixels(path)
    mask = pixels(carried["mask"]) > 0
    assert np.array_equal(pixels(carried["init_image"]), before)
    assert 0 < mask.mean() < 0.8 and np.array_equal(before[~mask], after[~mask])
    assert (before[mask] != after[mask]).any()
    assert f"--mask={carried['mask']}" in value(page, "command")


def test_cancel_ends_it_soon_and_the_next_picture_is_drawn(open_tab):
    page = open_tab()
    fill(page, prompt="a red apple", steps=100)
    page.click("#draw")
    wait(page, "^Step")
    page.click("#cancel")
    wait(page, "^Stopped after step \\d+ of 100")
    assert int(re.findall(r"\d+", page.inner_text("#status .says"))[0]) < 100
    assert scrub(page, "ArrowLeft").startswith("step ")
    assert value(page, "command") == ""  # no command repeats a stopped drawing
    draw(page, prompt="a tree")


def test_bad_input_is_one_sentence_in_the_page(open_tab):
    page = open_tab()
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"size": "13x13"}, "the width must be a multiple of 8, not 13"),
        ({"size": "large"}, "a size is width x height, like 512x768, not 'large'"),
        ({"size": "", "seed": -5}, "the seed must be between 0 and 9223372036854775807, not -5"),
    ]
    for wrong, says in wrongs:
        fill(page, **wrong)
        page.click("#draw")
        # Gradio sends an answer twice, and the last one's second copy can overtake this one. By hand nobody
        # is that quick, and who sees the old sentence clicks again.
        shown = "says => document.querySelector('#status .says').innerText === says"
        for _ in range(6):
            with contextlib.suppress(playwright.TimeoutError):
                page.wait_for_function(shown, arg=says, timeout=10_000)
                break
            page.click("#draw")
        assert page.locator("#status [role=alert]").count() == 1
    page.click("#copy-command")
    wait(page, "^Nothing to copy yet")
    page.get_by_text("Another model").click()
    fill(page, model="nowhere/at/all.safetensors")
    page.click("#load")
    wait(page, "nowhere/at/all.safetensors")
    assert page.locator("#status [role=alert]").count() == 1


def test_another_model_is_loaded_by_its_path(open_tab, model):
    page = open_tab()
    page.get_by_text("Another model").click()
    fill(page, model=model)
    page.click("#load")
    wait(page, "^Loaded tiny, for pictures of 64x64")
    assert (value(page, "cfg"), value(page, "steps")) == ("7.5", "25")  # its own best, not the mini's
    path = draw(page, prompt="a cat")
    assert carried_by(path)["model"] == model and Image.open(path).size == (64, 64)


def test_two_tabs_at_once_do_not_mix(open_tab):
    from reifusion.studio.drawing import model

    wanted = {open_tab(): ("a red apple", 7), open_tab(): ("a blue fish", 8)}
    for page, (prompt, seed) in wanted.items():
        fill(page, prompt=prompt, seed=seed, steps=6)
    for page in wanted:
        page.click("#draw")
    for page, (prompt, seed) in wanted.items():
        path = drawn(page)
        assert [text.split()[0] for text in page.locator("#view .word").all_inner_texts()] == prompt.split()
        request = Request(prompt, seed=seed, **DEFAULT, steps=6)
        assert np.array_equal(pixels(path), np.asarray(model("mini").generate(request, progress=False)))
        assert page.locator("#strip img").count() == 1
        assert scrub(page, "ArrowLeft").startswith("step 6 of 6")


def test_the_last_pictures_stay_side_by_side_while_settings_are_dragged(open_tab):
    page = open_tab()
    draw(page, prompt="a red apple", seed=21)
    page.check("#live input")
    box = page.locator("#cfg input[type=range]").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.16, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_function("document.querySelectorAll('#strip img').length === 2")
    dragged = carried_by(drawn(page))
    assert dragged["cfg"] == float(value(page, "cfg")) > 10 and dragged["seed"] == 21
    fill(page, seed=22)
    page.wait_for_function("document.querySelectorAll('#strip img').length === 3")
    assert carried_by(drawn(page)) == dragged | {"seed": 22}
    page.uncheck("#live input")
    page.locator("#strip button:has(img)").nth(2).click()  # the first of them
    wait(page, "^Settings of ")
    assert [value(page, name) for name in ("prompt", "seed", "cfg")] == [
        "a red apple",
        "21",
        f"{MINI.cfg:g}",
    ]


def test_a_picture_of_the_gallery_gives_its_settings_back(open_tab):
    page = open_tab()
    draw(page, prompt="a red apple", seed=23, steps=5)
    fill(page, prompt="something else", seed=1, steps=9)
    page.get_by_text("Gallery: ").click()
    page.wait_for_selector("#shelf img")
    page.locator("#shelf button:has(img)").first.click()
    wait(page, "^Settings of ")
    assert [value(page, name) for name in ("prompt", "seed", "steps")] == ["a red apple", "23", "5"]
    assert DEFAULT["sampler"] in page.inner_text("#facts")


def test_everything_can_be_done_by_keyboard(open_tab):
    page = open_tab()
    page.focus("#prompt textarea, #prompt input")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "draw"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("a tree")
    page.keyboard.press("Enter")
    assert carried_by(drawn(page))["prompt"] == "a tree"
    assert scrub(page, "ArrowLeft").startswith(f"step {MINI.steps} of ")
    page.focus("#view .canvas")
    page.keyboard.press("Tab")
    assert page.evaluate(LIT) == [1, 0]
