"""The command line, whatever it is given: the right result, or one sentence and exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from reifusion import cli
from reifusion.model.samplers import SAMPLERS
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks

MANY = int(os.environ.get("REIFUSION_MANY", 1))  # times as many examples: a longer search, by hand


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a tiny model, pictures and files that are neither; the tests run in it."""
    folder = tmp_path_factory.mktemp("here")
    save(SMALL, networks(SMALL, noise=0.05), folder / "tiny.safetensors", tokenizer=WORDS)
    Image.new("RGB", (32, 32), "red").save(folder / "photo.png")
    Image.new("RGBA", (20, 40), (255, 255, 255, 0)).save(folder / "hole.png")
    (folder / "torn.png").write_bytes((folder / "photo.png").read_bytes()[:60])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "words.txt").write_text("a cat")
    (folder / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def check(code: int, out: str, err: str) -> None:
    """Right, or one sentence and exit code 2; notices may come before."""
    assert code in (0, 2), err
    lines = err.splitlines()
    assert all(line.startswith("reifusion: ") and len(line) < 400 for line in lines), err
    assert "Traceback" not in err
    assert out.strip() if code == 0 else (lines and not out.strip())


anything = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=20) | st.text(
    string.printable.replace("/", ""), max_size=20
)
numbers = st.one_of(
    st.integers(-3, 40).map(str),
    st.floats(-100, 100).map(str),
    st.sampled_from(["", "x", "nan", "inf", "-inf", "1e400", "9" * 40, "٣", "0x10", " 1", "1_0", "-0"]),
)
files = st.sampled_from([
    "tiny.safetensors", "photo.png", "hole.png", "torn.png", "empty.safetensors", "words.txt", "folder",
    "missing", "", ".", "x" * 300,
])  # fmt: skip
OPTIONS = {
    "negative": anything,
    "model": files,
    "lora": files | anything,
    "sampler": st.sampled_from(sorted(SAMPLERS)) | anything,
    "steps": st.sampled_from(["1", "2", "0", "-1", "1001", "", "x", "1.5", "9" * 40]),
    "cfg": numbers,
    "seed": numbers,
    "size": st.sampled_from(["32x32", "16x48", "0x0", "33x32", "32", "x", "32x32x32", "٣٢x٣٢", "-8x8"])
    | anything,
    "init-image": files,
    "mask": files,
    "strength": numbers,
    "clip-skip": numbers,
    "guidance-interval": st.tuples(numbers, numbers).map(":".join) | anything,
    "guidance-rescale": numbers,
    "image-guidance": numbers,
    "deepcache": numbers,
    "dtype": st.sampled_from(["fp32", "bf16", "fp8"]) | anything,
    "device": st.sampled_from(["cpu", "cuda", "cuda:9", "meta", "xpu", "hpu", "cpu:7"]) | anything,
    "num": st.sampled_from(["1", "2", "0", "-1", "x"]),
    "like": files,
    "out": st.sampled_from(["o", "o.png", "o.jpg", "photo.png", "words.txt", "folder", ""])
    | st.text(
        st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="/"), max_size=20
    ),
}
given_options = st.lists(
    st.sampled_from(sorted(OPTIONS)).flatmap(lambda name: OPTIONS[name].map(lambda text: f"--{name}={text}")),
    max_size=3,
)
searched = settings(
    max_examples=60 * MANY, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow
@given(options=given_options, prompt=anything)
@searched
def test_generate_draws_or_says_why_not(here, options, prompt):
    asked = ["generate", "--model=tiny.safetensors", "--steps=1", "--quiet", *options, "--", prompt]
    code, out, err = run(*asked)
    check(code, out, err)
    for path in out.splitlines():
        assert Image.open(path).size
    assert not list(here.rglob(".*.png"))  # nothing half-written is left


@given(file=files | anything)
@searched
def test_info_tells_or_says_why_not(here, file):
    check(*run("info", "--", file))


@given(
    source=files,
    target=st.sampled_from(
        ["new.safetensors", "new", "photo.png", "folder", "", "a/b", "words.txt/x", "x" * 300]
    ),
    to=st.sampled_from(["native", "compvis", "diffusers"]) | anything,
)
@searched
def test_convert_writes_or_says_why_not(here, source, target, to):
    before = {path: path.stat().st_mtime_ns for path in here.iterdir() if path.is_file()}
    code, out, err = run("convert", f"--to={to}", "--", source, target)
    check(code, out, err)
    if code == 0:
        assert run("info", target)[0] == 0
        written = Path(target)
        written.rename(here.parent / f"{here.name}-{len(os.listdir(here.parent))}")
    for path, when in before.items():
        assert path.stat().st_mtime_ns == when, f"{path} was changed"


@given(words=st.lists(anything, max_size=4))
@searched
def test_any_words_are_a_command_or_one_sentence(here, words):
    if words and words[0] not in ("studio", "train", "explain", "check"):
        check(*run(*words))
