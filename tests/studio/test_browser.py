"""The studio in a real Chromium, drawing with the mini. Screenshots go to $REIFUSION_ARTIFACTS."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reifusion.model.request import Request

pytestmark = pytest.mark.browser

# How dark the canvas over the picture is, on average; and the words that are lit, each from 0 to 1.
SHADE = """() => { const c = document.querySelector('#view canvas');
    if (!c.width || !c.height) return 0;
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    return d.filter((_, i) => i % 4 === 3).reduce((a, b) => a + b, 0) / (d.length / 4); }"""
LIT = (
    "() => [...document.querySelectorAll('#view .word')].map(w => Number(w.style.getPropertyValue('--lit')))"
)
# The controls that a screen reader would have no name for.
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, [role=slider]')]
    .filter(e => e.offsetParent !== null && e.type !== 'file' && !e.labels?.length && !e.ariaLabel
        && !e.title && !e.getAttribute('aria-labelledby') && !e.innerText?.trim())
    .map(e => e.outerHTML.slice(0, 160))"""


def fill(page: Any, **fields: object) -> None:
    for name, value in fields.items():
        page.locator(f"#{name} :is(textarea, input:not([type=range]))").first.fill(str(value))
        page.keyboard.press("Tab")


def draw(page: Any, **fields: object) -> None:
    """Draws in a page, to the end."""
    fill(page, **{"steps": 6, "seed": 3} | fields)
    page.click("#draw")
    page.wait_for_function("document.querySelector('#status').innerText.match(/^(Step|Loading|Waiting)/)")
    wait(page, "^Done")
    page.wait_for_selector("#view .word")


def wait(page: Any, status: str) -> None:
    page.wait_for_function(f"/{status}/.test(document.querySelector('#status').innerText.trim())")


def drawn(page: Any) -> Path:
    return Path(page.inner_text("#status").strip().removeprefix("Done: "))


def carried_by(path: Path) -> dict[str, Any]:
    picture: Any = Image.open(path)
    return json.loads(picture.text["reifusion"])


def scrub(page: Any, key: str) -> str:
    """Moves the step slider by keyboard -> the caption that then appears."""
    before = page.inner_text("#view figcaption b")
    page.focus("#place input[type=range]")
    page.keyboard.press(key)
    page.wait_for_function(
        "old => document.querySelector('#view figcaption b').innerText !== old", arg=before
    )
    return page.inner_text("#view figcaption b")


def test_a_picture_forms_step_by_step(tab, artifacts):
    page = tab()
    page.evaluate("""() => { window.seen = new Set(); new MutationObserver(() => {
        const image = document.querySelector('#view img'); if (image) window.seen.add(image.src);
    }).observe(document.body, {subtree: true, childList: true, attributes: true}); }""")
    draw(page, prompt="a red apple", steps=10)
    assert page.evaluate("window.seen.size") > 3  # the noise, some of the steps at least, the picture
    carried = carried_by(drawn(page))
    assert (carried["prompt"], carried["seed"], carried["steps"]) == ("a red apple", 3, 10)
    assert page.locator("#strip img").count() == 1
    page.screenshot(path=artifacts / "studio-1200.png", full_page=True)
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_timeout(500)
    page.screenshot(path=artifacts / "studio-360.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_words_light_up_pixels_and_pixels_words_by_mouse_and_by_keyboard(tab, artifacts):
    page = tab()
    draw(page, prompt="a red apple")
    word, picture = page.locator("#view .word").nth(2), page.locator("#view .canvas")
    assert page.evaluate(SHADE) == 0
    word.hover()
    assert page.evaluate(SHADE) > 5 and page.evaluate(LIT) == [0, 0, 1]
    page.screenshot(path=artifacts / "studio-word.png")
    page.hover("h1")
    assert page.evaluate(SHADE) == 0 and max(page.evaluate(LIT)) == 0
    word.focus()
    assert page.evaluate(SHADE) > 5 and page.evaluate(LIT) == [0, 0, 1]
    page.evaluate("document.activeElement.blur()")
    assert page.evaluate(SHADE) == 0
    box, lit = picture.bounding_box(), set()
    for x, y in [(0.1, 0.1), (0.5, 0.5), (0.9, 0.5), (0.5, 0.9), (0.3, 0.6)]:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        lit.add(tuple(page.evaluate(LIT)))
        assert page.inner_text("#view .here").startswith("Here: ")
    assert len(lit) > 2 and max(map(max, lit)) > 0
    page.hover("h1")
    picture.focus()
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#view .view", "data-place") == "0.56,0.50"


def test_scrubbing_goes_through_the_steps_with_marker_and_equations(tab):
    page = tab()
    draw(page, prompt="a red apple")
    where = lambda: page.get_attribute("#schedule .marker", "d")  # noqa: E731
    end = where()
    assert "The picture is decoded" in page.inner_text("#happens")
    assert scrub(page, "ArrowLeft").startswith("step 6 of 6, t = ")
    page.wait_for_function("document.querySelector('#happens').innerText.includes('Ho & Salimans 2022')")
    assert scrub(page, "ArrowLeft").startswith("step 5 of 6") and where() != end
    assert scrub(page, "Home") == "the noise it began with" and page.locator("#view .word").count() == 0


def test_only_what_is_painted_changes(tab, artifacts):
    page = tab()
    draw(page, prompt="a red apple")
    before = drawn(page)
    page.get_by_text("Begin with a picture, paint what is to change").click()
    page.click("#reuse")
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 12, middle[1] + 8, steps=6)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.screenshot(path=artifacts / "studio-mask.png")
    draw(page, prompt="a blue fish", seed=4)
    carried = carried_by(drawn(page))
    mask = np.asarray(Image.open(carried["mask"])) > 0
    old, new = np.asarray(Image.open(before)), np.asarray(Image.open(drawn(page)))
    assert np.array_equal(np.asarray(Image.open(carried["init_image"])), old)
    assert 0 < mask.mean() < 0.8 and np.array_equal(old[~mask], new[~mask]) and (old[mask] != new[mask]).any()
    assert f"--mask={carried['mask']}" in command(page)


def command(page: Any) -> str:
    """What there is to copy."""
    page.wait_for_function("document.querySelector('#command textarea').value !== ''")
    return page.locator("#command textarea").input_value()


def test_cancel_ends_it_soon_and_the_next_picture_is_drawn(tab):
    page = tab()
    fill(page, prompt="a red apple", steps=100)
    page.click("#draw")
    wait(page, "^Step")
    page.click("#cancel")
    wait(page, "^Stopped after step \\d+ of 100")
    assert int(re.findall(r"\d+", page.inner_text("#status"))[0]) < 100
    assert scrub(page, "ArrowLeft").startswith("step ")
    draw(page, prompt="a tree")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"size": "13x13"}, "the width must be a multiple of 8, not 13"),
        ({"size": "large"}, "a size is width x height, like 512x768, not 'large'"),
        ({"seed": -5}, "the seed must be between 0 and 9223372036854775807, not -5"),
    ],
)
def test_bad_input_is_one_sentence_in_the_page(tab, fields, says):
    page = tab()
    fill(page, prompt="a red apple", steps=4, **fields)
    page.click("#draw")
    page.wait_for_selector("#status [role=alert]")
    assert page.inner_text("#status").strip() == says


def test_what_is_no_model_is_one_sentence_and_the_mini_still_draws(tab):
    page = tab()
    page.get_by_text("Another model").click()
    fill(page, model="nowhere/at/all.safetensors")
    page.click("#load")
    page.wait_for_selector("#status [role=alert]")
    assert "nowhere/at/all.safetensors" in page.inner_text("#status")
    draw(page, prompt="a tree", model="mini")


def test_two_tabs_at_once_do_not_mix(tab):
    from reifusion.studio.drawing import model

    first, second = tab(), tab()
    wanted = {first: ("a red apple", 7), second: ("a blue fish", 8)}
    for page, (prompt, seed) in wanted.items():
        fill(page, prompt=prompt, seed=seed, steps=12)
    for page in wanted:
        page.click("#draw")
    for page, (prompt, seed) in wanted.items():
        wait(page, "^Done")
        page.wait_for_selector("#view .word")
        assert [text.split()[0] for text in page.locator("#view .word").all_inner_texts()] == prompt.split()
        request = Request(prompt, seed=seed, sampler_name="dpmpp_2m_karras", n_inference_steps=12)
        alone = model("mini").generate(request, progress=False)
        assert np.array_equal(np.asarray(Image.open(drawn(page))), np.asarray(alone))
        assert page.locator("#strip img").count() == 1
        assert scrub(page, "ArrowLeft").startswith("step 12 of 12")


def test_a_picture_of_the_gallery_gives_its_settings_back(tab):
    page = tab()
    draw(page, prompt="a red apple", seed=21, steps=5)
    fill(page, prompt="something else", seed=1, steps=9)
    page.get_by_text("Gallery: ").click()
    page.wait_for_selector("#shelf img")
    page.locator("#shelf button:has(img)").first.click()
    wait(page, "^Settings of ")
    values = [
        page.locator(f"#{name} :is(textarea, input)").first.input_value()
        for name in ("prompt", "seed", "steps")
    ]
    assert values == ["a red apple", "21", "5"]
    assert "dpmpp_2m_karras" in page.inner_text("#facts")
    assert command(page).startswith("reifusion generate") and "--seed=21" in command(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy-command")
    page.wait_for_timeout(500)
    assert page.evaluate("navigator.clipboard.readText()") == command(page)


def test_every_control_has_a_name_and_draw_is_reached_by_keyboard(tab):
    page = tab()
    page.get_by_text("Another model").click()
    assert page.evaluate(NAMELESS) == []
    page.focus("#prompt textarea, #prompt input")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "draw"
