"""New words: read as other programs write them, encoded as by diffusers, learned from pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn

from reifusion.album import read
from reifusion.api import load
from reifusion.cli.main import main
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tensors import ModelError
from reifusion.train.inversion import Learned, with_word
from reifusion.train.text2image import TextToImage, denoising_loss, forward_process
from reifusion.weights import save
from reifusion.weights.inversion import Embedding, load_embedding, save_embedding, teach
from tests.tiny import SMALL, WORDS, networks

WIDTH = SMALL.clip.width


@pytest.fixture
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.02))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(SMALL, networks(SMALL, noise=0.02), path, tokenizer=WORDS)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).ellipse([4 + i, 4, 26 + i, 28], "purple")
        picture.save(folder / f"{i}.png")
    return folder


def vectors(count: int = 3) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


# Words in prompts


@pytest.mark.parametrize("count", [1, 3])
def test_text_with_a_learned_word_is_encoded_as_by_diffusers(folder, tmp_path, count):
    own = load(folder, "cpu", "fp32")
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    save_file({"<zork>": vectors(count)}, tmp_path / "zork.safetensors")
    theirs.load_textual_inversion(str(tmp_path), weight_name="zork.safetensors", token="<zork>")
    teach(own, load_embedding(tmp_path / "zork.safetensors"))
    for prompt in ("a cat", "<zork>", "a cat, <zork>. dog", "<zork><zork>", "dog" * 9 + " <zork>"):
        expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # of what is cut off
            assert torch.allclose(own.encode_text([prompt]), expected, atol=2e-5), prompt


def test_a_model_that_has_learned_a_word_keeps_it_in_its_file(pipe, tmp_path):
    before = pipe.encode_text(["a cat", "dog"])
    teach(pipe, Embedding("zork", vectors()))
    assert torch.equal(pipe.encode_text(["a cat", "dog"]), before)
    ids = pipe.tokenizer.tokenize("a Zork")
    assert ids[-3:] == [SMALL.clip.vocab_size + k for k in range(3)]
    for target in (tmp_path / "a.safetensors", tmp_path / "folder"):
        layout = "native" if target.suffix else "diffusers"
        save(pipe.config, pipe.models, target, layout, pipe.tokenizer)
        again = load(target, "cpu", "fp32")
        assert again.tokenizer.tokenize("a Zork") == ids
        assert torch.equal(again.encode_text(["a zork"]), pipe.encode_text(["a zork"]))


def test_two_words_stand_side_by_side(pipe):
    teach(pipe, Embedding("zork", vectors(2)))
    teach(pipe, Embedding("blob", vectors(1)))
    n = SMALL.clip.vocab_size
    assert pipe.tokenizer.tokenize("blob zork blob") == [n + 2, n, n + 1, n + 2]


# Files


def test_files_of_all_programs_are_read(tmp_path):
    wanted = vectors()
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(wanted)}, "name": "zork"}
    torch.save(a1111 | {"step": 100, "sd_checkpoint": None}, tmp_path / "one.pt")
    torch.save({"<zork>": wanted}, tmp_path / "two.bin")
    save_file({"emb_params": wanted}, tmp_path / "three.safetensors")
    save_embedding(Embedding("zork", wanted), tmp_path / "four.safetensors")
    words = {}
    for path in sorted(tmp_path.iterdir()):
        found = load_embedding(path)
        assert torch.equal(found.vectors, wanted)
        words[path.stem] = found.word
        assert load_embedding(path, "other").word == "other"
    assert words == {"one": "zork", "two": "<zork>", "three": "three", "four": "zork"}
    torch.save({"<zork>": wanted[0]}, tmp_path / "two.bin")  # a single vector, without an axis
    assert torch.equal(load_embedding(tmp_path / "two.bin").vectors, wanted[:1])


@pytest.mark.parametrize(
    "content, said",
    [
        ({"clip_l": vectors(), "clip_g": vectors()[:1]}, "3 for the first text encoder and 1 for the second"),
        ({"clip_g": vectors()}, "not an embedding, which is vectors"),
        (
            {"a.lora_down.weight": vectors(), "a.lora_up.weight": vectors()},
            "not an embedding, which is vectors",
        ),
        ({"zork": vectors() * torch.nan}, "not finite"),
        ({"zork": torch.ones(2, 2, 2)}, "not an embedding"),
        ({"zork": torch.ones(0, 4)}, "not an embedding"),
        ({"zork": torch.ones(4, 0)}, "not an embedding"),
        ({"zork": torch.tensor(1.0)}, "not an embedding"),
    ],
)
def test_what_is_no_embedding_is_refused(content, said, tmp_path):
    save_file(content, tmp_path / "zork.safetensors")
    with pytest.raises(ModelError, match=said):
        load_embedding(tmp_path / "zork.safetensors")


def test_code_in_a_file_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    torch.save({"string_to_param": {"*": vectors()}, "name": Evil()}, tmp_path / "zork.pt")
    with pytest.raises(ModelError):
        load_embedding(tmp_path / "zork.pt")
    assert not (tmp_path / "run").exists()


def test_words_that_do_not_fit_are_refused(pipe, tmp_path):
    with pytest.raises(ModelError, match="7 numbers a word, and that of small has 24"):
        teach(pipe, Embedding("zork", torch.ones(1, 7)))
    for word in ("cat", "zork"):
        if word == "zork":
            teach(pipe, Embedding("zork", vectors()))
        with pytest.raises(ValueError, match=f"'{word}' is a word that the model knows"):
            teach(pipe, Embedding(word, vectors()))
    assert pipe.config.clip.vocab_size == SMALL.clip.vocab_size + 3


def test_a_model_with_several_text_encoders_is_refused(pipe):
    pipe.models["clip_2"] = pipe.models["clip"]
    with pytest.raises(ModelError, match="for one text encoder, and small has more"):
        teach(pipe, Embedding("zork", vectors()))


# Pictures


def test_a_picture_with_a_learned_word_says_so_and_is_drawn_again(model, tmp_path, capsys):
    save_embedding(Embedding("zork", 5 * vectors()), tmp_path / "e.safetensors")
    line = ["generate", "a zork", f"--model={model}", "--steps=2", "--seed=1", "--quiet"]
    assert main([*line, f"--out={tmp_path / 'plain.png'}"]) == 0
    for name, file in ("one", "e.safetensors"), ("two", "e.safetensors:blob"):
        word = ["generate", "a blob"] if name == "two" else line[:2]
        assert main([*word, *line[2:], f"--embedding={tmp_path / file}", f"--out={tmp_path / name}.png"]) == 0
    plain, one, two = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("plain", "one", "two"))
    assert plain != one == two
    entry = read(tmp_path / "one.png")
    assert entry.settings.embedding == ((str(tmp_path / "e.safetensors"), ""),)
    assert len(entry.hashes["embedding"]) == 1
    again = [f"--like={tmp_path / 'one.png'}", f"--out={tmp_path / 'again.png'}", "--quiet"]
    assert main(["generate", *again]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == one
    capsys.readouterr()
    assert main([*line, f"--embedding={tmp_path / 'none.pt'}"]) == 2
    assert "none.pt" in capsys.readouterr().err


# Training


def test_only_the_word_is_learned(model, pictures, tmp_path):
    run, out = tmp_path / "run", tmp_path / "zork.safetensors"
    line = ["train", "inversion", f"start={model}", f"data={pictures}", "word=zork", "vectors=2", "batch=2"]
    line += ["steps=6", "keep_every=3", "mixed_precision=no", f"folder={run}", f"out={out}"]
    assert main(line) == 0
    learned = load_embedding(out)
    assert learned.word == "zork" and learned.vectors.shape == (2, WIDTH)
    assert load_file(tmp_path / "zork-000003.safetensors")["zork"].ne(learned.vectors).any()
    assert {path.name for path in run.glob("sheet-*.png")} == {"sheet-000006.png"}
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert set(state["ema"]) == {"clip.embedding.token.vectors"}
    assert (run / "checkpoint.pt").stat().st_size < 100_000


@pytest.mark.slow
def test_a_sheet_that_fails_changes_nothing(model, pictures, tmp_path, monkeypatch):
    line = ["train", "inversion", f"start={model}", f"data={pictures}", "word=zork", "batch=2", "steps=6"]
    line += ["ema=0.5", "checkpoint_minutes=0", "mixed_precision=no", "lr=0.1"]

    def learned(name: str) -> torch.Tensor:
        out = tmp_path / f"{name}.safetensors"
        assert main([*line, f"folder={tmp_path / name}", f"out={out}"]) == 0
        return load_embedding(out).vectors

    whole = learned("whole")

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("reifusion.train.watch.Watch.look", fails)
    assert torch.equal(learned("failed"), whole)


def test_learning_goes_downhill(pipe):
    teach(pipe, Embedding("zork", vectors(2)))
    model = TextToImage(pipe.config)
    model.clip.load_state_dict(pipe.models["clip"].state_dict())
    model.diffusion.load_state_dict(pipe.models["diffusion"].state_dict())
    learned: Any = Learned(model.clip.embedding.token, 2)
    model.requires_grad_(False).clip.embedding.token = learned
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 16, 16, generator=generator).unbind()
    tokens = torch.tensor(
        [pipe.tokenizer.encode(text) for text in ("zork", "a zork", "zork cat", "dog zork")]
    )
    t, sampler = torch.tensor([100, 400, 700, 900]), forward_process(SMALL.schedule)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(40):
        loss, _ = denoising_loss(model, sampler, latents, tokens, t, noise, torch.ones(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.995 * losses[0]
    assert all(a > b for a, b in zip(losses[::10], losses[10::10]))


def test_the_table_is_that_of_before_with_rows_that_learn():
    table = nn.Embedding(6, 4)
    rows = Learned(copy.deepcopy(table), 2)
    tokens = torch.tensor([[0, 4, 3], [5, 1, 4]])
    assert torch.equal(rows(tokens), table(tokens))
    rows(tokens).sum().backward()
    assert rows.vectors.grad is not None
    assert torch.equal(rows.vectors.grad, torch.tensor([[2.0], [1.0]]).expand(2, 4))


def test_captions_have_the_word():
    assert with_word(("a red Zork", "a cat"), "zork") == ("a red Zork",)
    made = with_word(("a cat", ""), "zork")
    assert len(set(made)) > 3 and all("zork" in caption for caption in made)


@pytest.mark.parametrize(
    "given, said",
    [
        ([], "the word to learn is missing"),
        (["word=cat"], "word cannot be 'cat'"),
        (["word=zork", "data=emoji"], "learned from your own pictures"),
        (["word=zork", "vectors=99"], "vectors"),
        (["word=zork", "train_text_encoder=true"], "train_text_encoder"),
    ],
)
def test_bad_recipes_are_refused_in_a_sentence(given, said, model, pictures, tmp_path, capsys):
    run = tmp_path / "run"
    line = ["train", "inversion", f"start={model}", f"data={pictures}", "steps=2", f"folder={run}", *given]
    assert main(line) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
    assert not (run / "checkpoint.pt").exists()
