"""What a picture says about itself: what is written is read back, and what is brought is read or refused."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reifusion import a1111, album
from reifusion.model.prompts import warn_of_syntax
from reifusion.model.samplers import SAMPLERS
from reifusion.settings import Settings
from reifusion.steer import hires
from tests.tiny import WORDS

MANY = int(os.environ.get("REIFUSION_MANY", 1))  # times as many examples: a longer search, by hand

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=20)
ANY = st.builds(
    Settings,
    prompt=st.text(max_size=60) | st.just('a "cat", b: c\nNegative prompt: d\nSteps: 3, Sampler: x'),
    negative=st.text(max_size=30),
    model=names,
    lora=st.lists(st.tuples(names, finite), max_size=3).map(tuple),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    steps=st.integers(1, 1000),
    cfg=finite,
    seed=st.integers(0, 2**63 - 1),
    size=st.tuples(st.integers(8, 4096), st.integers(8, 4096)),
    init_image=st.none() | names,
    mask=st.none() | names,
    strength=st.floats(0.01, 1),
    clip_skip=st.integers(0, 11),
    guidance_interval=st.none() | st.tuples(finite, finite),
    guidance_rescale=st.floats(0, 1),
    image_guidance=st.none() | finite,
    deepcache=st.integers(1, 9),
    int8=st.booleans(),
    dtype=st.sampled_from([None, "float32"]),
)


@given(ANY, names)
@settings(max_examples=150 * MANY, deadline=None)
def test_any_settings_are_read_back_from_the_picture_and_the_disk_has_one_file(tmp_path_factory, asked, name):
    folder = tmp_path_factory.mktemp("any")
    hashes: dict[str, Any] = {"model": "0123456789"}
    if asked.lora:
        hashes["lora"] = ["abcdef0123"] * len(asked.lora)
    entry = album.Entry(asked, hashes, name)
    path = album.save(Image.new("RGB", (1, 1)), entry, folder / album.file_name(asked))
    assert album.read(path) == entry
    assert os.listdir(folder) == [path.name]


def facts(line: str) -> dict[str, str]:
    """The facts of a line, as A1111 documents them: a value with a comma, a colon or a line break is JSON."""
    found = re.findall(r'\s*([\w ]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)', line)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


@given(ANY, names)
@settings(max_examples=150 * MANY, deadline=None)
def test_names_with_commas_or_colons_are_quoted_as_a1111_quotes_them(asked, name):
    asked = replace(asked, prompt="a cat", negative="")
    text = a1111.write(asked, name, "0123456789", ["abcdef0123"] * len(asked.lora))
    line = text.rpartition("\nSteps: ")[2]
    told = facts("Steps: " + line)
    assert told["Steps"] == str(asked.steps) and told["Seed"] == str(asked.seed)
    assert told["Model"].strip() == name.strip() and told["Model hash"] == "0123456789"


@given(ANY)
@settings(max_examples=150 * MANY, deadline=None)
def test_our_own_text_for_other_programs_can_be_read_too(asked):
    asked = replace(asked, lora=(), prompt="a cat", negative="a dog, blurry")
    read, told = a1111.read(a1111.write(asked, 'one, "two": three', "0123456789"))
    for name in (
        "prompt",
        "negative",
        "sampler",
        "steps",
        "cfg",
        "seed",
        "size",
        "clip_skip",
        "image_guidance",
    ):
        assert getattr(read, name) == getattr(asked, name), name
    assert told["Model"] == 'one, "two": three'


def carrying(path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, "PNG", pnginfo=chunks)
    return path


THEIRS = """a cat, (red:1.2),
on a mat <lora:zork:0.8>
Negative prompt: blurry,
text
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 12345, Size: 512x768, \
Model hash: 6ce0161689, Model: "v1-5, pruned", Denoising strength: 0.6, Clip skip: 2, \
Lora hashes: "zork: 0123456789ab", Version: v1.10.1"""


def test_the_text_of_a1111_is_read(tmp_path):
    entry = album.read(carrying(tmp_path / "a.png", parameters=THEIRS))
    assert entry.settings == Settings(
        "a cat, (red:1.2),\non a mat", "blurry,\ntext", sampler="dpmpp_2m_karras", steps=20,
        cfg=7.0, seed=12345, size=(512, 768), strength=0.6, clip_skip=1, lora=(("zork.safetensors", 0.8),),
    )  # fmt: skip
    assert (entry.model_name, entry.hashes, entry.ours) == ("v1-5, pruned", {"model": "6ce0161689"}, False)
    assert entry.carried()["model"] == "v1-5, pruned"


@pytest.mark.parametrize(
    ("tags", "loras"),
    [
        ("<lora:a>", (("a.safetensors", 1.0),)),
        ("<lora:a:0.5:lbw=MIDD> <lora:b c:-1>", (("a.safetensors", 0.5, "MIDD"), ("b c.safetensors", -1.0))),
        ("<lora:../../x/a:0.5>", (("a.safetensors", 0.5),)),  # a name, and no place in the file system
        ("<hypernet:a:1>", ()),
    ],
)
def test_loras_of_a_foreign_prompt_are_files(tags, loras):
    read, _ = a1111.read(f"a cat {tags}\nSteps: 3, Seed: 1")
    assert read.lora == loras and read.prompt == ("a cat" if loras else f"a cat {tags}")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ("Hires upscale: 2, Hires steps: 10", "not repeated here: Hires steps"),
        ("Refiner: xl, Refiner switch at: 0.8, Seed resize from: 512x512", "Refiner, Seed resize from"),
        ('ControlNet 0: "Module: canny, Model: x"', "not repeated here: ControlNet 0"),
        ("Emphasis: Ignore", "not repeated here: Emphasis"),
        ("Size: 512x512, Hires resize: 1024x1536", "not repeated here: Hires resize"),
        ("Size: 512x512, Hires resize: 384x384", "not repeated here: Hires resize"),
    ],
)
def test_facts_that_are_not_repeated_are_told(facts, says):
    with pytest.warns(UserWarning, match=says):
        a1111.read(f"a cat\nSteps: 20, {facts}")


def test_a_lora_with_a_weight_for_each_network_is_told():
    with pytest.warns(UserWarning, match=r"of its LoRA 'z', 1 is not repeated"):
        read, _ = a1111.read("a cat <lora:z:0.5:1>\nSteps: 20")
    assert read.lora == (("z.safetensors", 0.5),)


def test_emphasis_without_its_mean_is_read_and_written():
    read, _ = a1111.read("a cat\nSteps: 20, Sampler: Euler, Emphasis: No norm")
    assert read.emphasis == "plain"
    drawn = replace(read, size=(64, 64), cfg=2.0, seed=1)
    assert a1111.read(a1111.write(drawn, "m", "h"))[0].emphasis == "plain"


@pytest.mark.parametrize("eta", ["0.000000", "inf"])
def test_the_default_eta_of_stable_diffusion_cpp_is_the_sampler_s(eta):
    line = (
        "Skip layers: [7, 8, 9, ], Skip layer start: 0.01, , Eta: {}, Seed: 7, Size: 64x64, Sampler: euler_a"
    )
    with pytest.warns(UserWarning, match="not repeated here: Skip layers"):
        read, _ = a1111.read(f"a cat\nSteps: 20, {line.format(eta)}, Version: stable-diffusion.cpp")
    assert (read.eta, read.seed, read.size, read.sampler) == (None, 7, (64, 64), "euler_a")
    read.request()


@pytest.mark.parametrize("name", ["DPM++ SDE", "DPM2 a", "DPM++ 2M SDE", "DPM++ 2M", "Euler a"])
def test_before_schedules_had_names_of_their_own_they_were_even(name):
    read, _ = a1111.read(f"a cat\nSteps: 20, Sampler: {name}, Version: v1.6.0")
    assert read.schedule == "normal"
    assert a1111.read(f"a cat\nSteps: 20, Sampler: {name} Karras")[0].schedule in ("karras", None)


def test_the_second_pass_of_a1111_is_read_and_written():
    facts = "Steps: 3, Denoising strength: 0.7, Hires upscale: 1.5, Hires upscaler: {}"
    read, _ = a1111.read("a cat\n" + facts.format("Latent (nearest-exact)"))
    assert (read.hires, read.hires_strength, read.strength) == (1.5, 0.7, 0.8)
    assert read.hires_by == "latent-nearest-exact"
    with pytest.warns(UserWarning, match="the upscaler 'R-ESRGAN 4x' is not built in; it is Lanczos here"):
        assert a1111.read("a cat\n" + facts.format("R-ESRGAN 4x"))[0].hires_by == "lanczos"
    drawn = replace(read, sampler="euler", size=(64, 64), cfg=2.0, seed=1)
    said = "Denoising strength: 0.7, Hires upscale: 1.5, Hires upscaler: Latent (nearest-exact)"
    assert said in a1111.write(drawn, "m", "h")
    for by in hires.WAYS:
        again, _ = a1111.read(a1111.write(replace(drawn, hires_by=by), "m", "h"))
        assert (again.hires, again.hires_strength, again.hires_by) == (1.5, 0.7, by)
    sized, _ = a1111.read("a cat\nSteps: 3, Size: 512x768, Denoising strength: 0.6, Hires resize: 1024x1536")
    assert (sized.hires, sized.hires_strength, sized.hires_by) == (2.0, 0.6, "latent-bilinear")
    half, _ = a1111.read("a cat\nSteps: 3, Size: 512x768, Hires resize: 0x1152, Version: v1.9")
    assert half.hires == 1.5  # one side was asked for
    ours, _ = a1111.read("a\nSteps: 3, Hires upscale: 2, Hires upscaler: Latent, Version: reifusion 0.0")
    assert ours.hires_by == "latent"  # there was no other
    for odd in "Size: 0x0, Hires resize: 9x9", "Size: 64x64, Hires resize: 0x0":
        assert a1111.read(f"a cat\nSteps: 3, {odd}")[0].hires == 1
    assert "Hires" not in a1111.write(replace(drawn, init_image="x.png"), "m", "h")


@pytest.mark.parametrize(
    ("said", "sampler", "schedule"),
    [
        ("euler_a", "euler_a", None),
        ("dpm++2m karras", "dpmpp_2m", "karras"),
        ("dpm++2s_a discrete", "dpmpp_2s_a", "normal"),
    ],
)
def test_the_samplers_of_stable_diffusion_cpp_are_known_in_its_pictures(said, sampler, schedule, tmp_path):
    text = f"a cat\nSteps: 3, Seed: 1, RNG: cuda, Sampler: {said}, Version: stable-diffusion.cpp"
    path = carrying(tmp_path / "a.png", parameters=text + ', SDCPP: {"style": "oil", "Seed": 5}')
    entry = album.read(path)
    assert (entry.settings.sampler, entry.settings.schedule) == (sampler, schedule)
    assert (entry.settings.seed, entry.manner) == (1, "sdcpp")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_known_by_its_title(name):
    assert a1111.read(f"a\nSteps: 1, Sampler: {SAMPLERS[name].title}, Seed: 1")[0].sampler == name


@pytest.mark.parametrize(
    ("facts", "sampler", "says"),
    [
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m_karras", None),
        ("Sampler: DPM++ 2M", "dpmpp_2m", None),
        ("Sampler: Euler a, Schedule type: Automatic", "euler_a", None),
        ("Sampler: Euler, Schedule type: Turbo", "euler", "Euler is used without the schedule 'Turbo'"),
        ("Sampler: DPM adaptive", None, "the sampler 'DPM adaptive' is not built in"),
    ],
)
def test_a_sampler_or_schedule_that_is_not_built_in_is_said_to_be(facts, sampler, says):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert a1111.read(f"a cat\nSteps: 3, {facts}")[0].sampler == sampler
    assert [str(one.message)[: len(says or "")] for one in told] == ([says] if says else [])


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({}, "carries no settings"),
        ({"parameters": "a cat"}, "it has no line that begins with Steps"),
        ({"parameters": '{"prompt": "a cat"}'}, "it has no line that begins with Steps"),
        ({"parameters": "a\nSteps: many"}, "its Steps is 'many'"),
        ({"parameters": "a <lora:x:y>\nSteps: 3"}, "the weight of its LoRA 'x' is 'y'"),
        ({"parameters": "a\nSteps: 3, Hires upscale: two"}, "its Hires upscale is 'two'"),
        ({"parameters": "a\nSteps: 3, Size: 5"}, "its Size is '5'"),
        ({"parameters": "a\nSteps: 3, Seed: " + "x" * 10**6}, "its Seed is 'xxx"),
        ({"parameters": "a\nSteps: " + "9" * 10**5}, "its Steps is '999"),
        ({"reifusion": "[]"}, "carries no settings"),
        ({"reifusion": "{" * 10**5}, "carries no settings"),
        ({"reifusion": "[" * 10**5}, "carries no settings"),
        ({"reifusion": '{"prompt": [' + "0, " * 10**5 + "0]}"}, "its prompt is [0, 0"),
        ({"reifusion": '{"model_hash": [1]}'}, "its model_hash is [1]"),
        ({"reifusion": '{"seed": 1e999}'}, "its seed is inf"),
    ],
)
def test_a_text_that_says_nothing_is_refused_in_one_short_sentence(tmp_path, texts, says):
    path = carrying(tmp_path / "a.png", **texts)
    with pytest.raises(ValueError) as caught:
        album.read(path)
    assert says in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


@given(st.text(max_size=200) | st.lists(st.sampled_from(THEIRS.split(" "))).map(" ".join))
@settings(max_examples=300 * MANY, deadline=None)
def test_any_text_is_read_or_refused_in_one_sentence(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            a1111.read(text)
        except ValueError as error:
            assert re.match("it has no line|its [A-Z]", str(error))


@pytest.mark.parametrize("line", ["a" * 10**6, ": " * 10**6, '"' * 10**6, 'a: "b, ' * 10**5, "\\" * 10**6])
def test_a_text_of_a_million_letters_takes_no_time(line):
    a1111.read("a cat\nSteps: 3, " + line)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*Settings.__dataclass_fields__, *(f"{name}_hash" for name in album.FILES), "model_name", "odd"]


@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=8))
@settings(max_examples=200 * MANY, deadline=None)
def test_any_values_in_our_own_text_are_read_or_refused_in_one_sentence(tmp_path_factory, values):
    path = carrying(tmp_path_factory.getbasetemp() / "odd.png", reifusion=json.dumps(values))
    try:
        assert isinstance(album.read(path), album.Entry)
    except ValueError as error:
        assert "carries settings, but its" in str(error)


# Prompts


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a cat <lora:zork:0.8>", "<lora:zork:0.8> counts as plain words; a LoRA has a setting of its own"),
        ("a (red:1.3) cat", "(red:1.3) counts as plain words"),
        ("a [red] cat", "[red] counts as plain words"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5] counts as plain words"),
        ("a ((red)) cat", "((red)) counts as plain words"),
        ("a cat BREAK a dog", "BREAK counts as plain words"),
        ("(a:1.1) <hypernet:x:1>", "(a:1.1), <hypernet:x:1> counts as plain words"),
    ],
)
def test_the_language_of_other_programs_is_not_taken_as_words_without_a_notice(prompt, says):
    with pytest.warns(UserWarning) as told:
        warn_of_syntax([prompt, "a dog"])
    (message,) = (str(one.message) for one in told)
    assert message.startswith(f"in the prompt, {says}")
    assert message.endswith("; emphasis, as in --emphasis a1111, reads weights and breaks") == (
        "lora" not in prompt
    )


@pytest.mark.parametrize(
    "prompt", ["a cat (red)", "a cat :)", "a < b > c", "1:2", "a breakfast", "[]", "(a: b)", ""]
)
def test_words_are_words(prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_syntax([prompt])


@given(st.text(max_size=300) | st.text("()[]<>:lora1.3 BREAK\\", max_size=300))
@settings(max_examples=300 * MANY, deadline=None)
def test_any_prompt_becomes_as_many_tokens_as_the_model_reads(prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn_of_syntax([prompt])
    tokens = WORDS.encode(prompt)
    assert len(tokens) == 16 and all(0 <= token < WORDS.vocab_size for token in tokens)


@pytest.mark.parametrize(
    "prompt", ["(" * 10**6, "[" * 10**6, "<a" * 10**6, "(:" * 10**5, "(a: " + " " * 10**4]
)
def test_a_prompt_of_a_million_letters_takes_no_time(prompt):
    warn_of_syntax([prompt])


@pytest.mark.parametrize(
    ("facts", "sampler", "schedule"),
    [
        ("Sampler: Euler, Schedule type: SGM Uniform", "euler", "sgm_uniform"),
        ("Sampler: LMS, Schedule type: Karras", "lms", "karras"),
        ("Sampler: LMS Karras", "lms", "karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM++ SDE, Schedule type: Automatic", "dpmpp_2s_sde", "karras"),
        ("Sampler: Euler a, Schedule type: Automatic", "euler_a", None),
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpmpp_2m_karras", None),
        ("Sampler: DPM++ 2M, Schedule type: Align Your Steps", "dpmpp_2m", "align_your_steps"),
        ("Sampler: Restart, Schedule type: Karras", "restart", None),
    ],
)
def test_the_schedule_of_a1111_is_read_and_written(facts, sampler, schedule):
    read, _ = a1111.read(f"a cat\nSteps: 3, {facts}")
    assert (read.sampler, read.schedule) == (sampler, schedule)
    again, _ = a1111.read(a1111.write(replace(read, prompt="a cat", size=(64, 64), cfg=2.0), "m", "h"))
    assert (again.sampler, again.schedule) == (sampler, schedule)


def test_eta_and_noise_of_a1111_are_read_for_the_samplers_that_have_them():
    text = "a\nSteps: 3, Sampler: {}, Eta: 0.5, Sigma noise: 1.1, Sigma churn: 4"
    read, _ = a1111.read(text.format("Euler a"))
    assert (read.sampler, read.eta, read.s_noise, read.churn) == ("euler_a", 0.5, 1.1, None)
    read, _ = a1111.read(text.format("Euler"))
    assert (read.sampler, read.eta, read.churn) == ("euler_churn", None, 4.0)
    read, _ = a1111.read(text.format("Heun"))
    assert (read.sampler, read.eta, read.s_noise, read.churn) == ("heun", None, None, None)
