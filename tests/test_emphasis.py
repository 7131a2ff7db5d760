"""Weights and other signs in prompts, by the published rules, with numbers of the programs that have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from reifusion.album import read
from reifusion.cli.main import main
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.request import Request
from reifusion.model.tokenizer import Tokenizer
from reifusion.steer import emphasis
from reifusion.steer.emphasis import encode, weighted
from reifusion.steer.grammar import chunks, parse, parse_as_comfyui, schedule, together
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks, random_networks

ASKED: dict[str, Any] = {"steps": 4, "cfg": 3.0, "seed": 5, "size": (32, 32)}


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.05))


# AUTOMATIC1111's `parse_prompt_attention`, run on these


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("a (b c:1.3), d", [("a ", 1), ("b c", 1.3), (", d", 1)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", 0.909091)]),
        ("[[a]]", [("a", 0.826446)]),
        ("([a])", [("a", 1)]),
        ("[(a:1.5)]", [("a", 1.363636)]),
        ("(a", [("a", 1.1)]),
        ("[a", [("a", 0.909091)]),
        ("a)", [("a)", 1)]),
        ("a:1.2)", [("a:1.2)", 1)]),
        ("(a:1.2", [("a:1.2", 1.1)]),
        ("(a:1.1:1.3)", [("a:1.1", 1.3)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("(a [b] c:1.2)", [("a ", 1.2), ("b", 1.090909), (" c", 1.2)]),
        ("((a:1.3) b", [("a", 1.43), (" b", 1.1)]),
        ("(a:1.2)) b", [("a", 1.2), (") b", 1)]),
        ("(a b:1.2)(c:1.2)", [("a bc", 1.2)]),
        (r"\(a\)", [("(a)", 1)]),
        ("", [("", 1)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
        ("a BREAK b", [("a", 1), ("BREAK", -1), ("b", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55),
             (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
        ),
    ],
)  # fmt: skip
def test_brackets_multiply_as_in_the_web_ui(text, pieces):
    found = parse(text)
    assert [words for words, _ in found] == [words for words, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces], abs=1e-5)


def test_a_prompt_of_a_million_letters_is_refused_at_once():
    with pytest.raises(ValueError, match="20,000 is the most"):
        parse("(a" * 10**6)
    assert parse("(" * 10**3 + "a")[0][0] == "a"
    assert schedule("[a:" * 5000 + "b", 3)[0].startswith("[a:")


def test_letters_that_are_marks_inside_mean_nothing_in_a_prompt():
    assert schedule("a \0 (red) [b] \x0007\0 \1", 1) == ["a   (red) [b]  07   "]


@pytest.mark.parametrize(
    "read, text",
    [
        (parse, f"(red:{'9' * 400})"),
        (parse, "(" * 10**4 + "red"),
        (together, f"a AND red :{'9' * 400}"),
    ],
)
def test_a_weight_that_no_number_holds_is_refused(read, text):
    with pytest.raises(ValueError, match="weight of 'red' in the prompt is too large"):
        read(text)


def test_a_break_inside_brackets_is_still_a_break():
    assert parse("(a BREAK b:1.3)") == [("a", 1.3), ("BREAK", -1), ("b", 1.3)]


def test_the_three_rules_on_the_published_vector():
    z = torch.tensor([[1, -2, 0.5, 0], [2, 1, -1, 3], [0, 4, 1, -1], [1, 1, 1, 1]])
    w = torch.tensor([1, 1, 1.5, 1])
    kept = weighted(z, w, "a1111")
    assert kept[0].tolist() == pytest.approx([0.862069, -1.724138, 0.431034, 0], abs=1e-6)
    assert kept[2].tolist() == pytest.approx([0, 5.172414, 1.293103, -1.293103], abs=1e-6)
    assert kept.mean().item() == pytest.approx(z.mean().item())
    assert weighted(z, w, "plain")[2].tolist() == [0, 6, 1.5, -1.5]
    empty = torch.zeros(4, 4)
    empty[2] = torch.tensor([1.0, 0, 0, 1])
    comfy = weighted(z, w, "comfyui", empty)
    assert comfy[2].tolist() == [-0.5, 6, 1.5, -2] and torch.equal(comfy[:2], z[:2])
    # compel 2.5.1 on its own example: a weight above 1 is the same rule
    row, nothing = torch.tensor([[6.866667, 2.666667]]), torch.tensor([[3.866667, 0.9]])
    heavy = weighted(row, torch.tensor([1.5]), "comfyui", nothing)
    assert heavy[0].tolist() == pytest.approx([8.366667, 3.55], abs=1e-5)


def test_a_mean_of_nothing_is_not_divided_by():
    z = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert torch.equal(
        weighted(z, torch.tensor([1.0, 2.0]), "a1111"), torch.tensor([[1.0, -1.0], [4.0, -4.0]])
    )


# Chunks, by CLIP's own tokenizer


@pytest.mark.parametrize(("back", "words"), [(19, 57), (20, 56), (21, 75)])
def test_a_comma_that_lies_too_far_back_cuts_nothing(back, words):
    """A1111 counts from the comma itself, and 20 is the most."""
    clip = Tokenizer()
    text = " ".join(["cat"] * (75 - back)) + " , " + " ".join(["cat"] * 40)
    (first, _), *_ = chunks([(text, 1.0)], clip)
    assert first.index(clip.end) - 1 == words


def test_long_prompts_are_cut_at_commas_and_lose_nothing():
    clip = Tokenizer()
    words = [f"word{k}" for k in range(10)]
    text = " ".join(["cat"] * 60) + ", " + " ".join(["dog"] * 30)
    (first, _), (second, _) = chunks(parse(text), clip)
    assert len(first) == len(second) == 77
    assert clip.decode(first) == " ".join(["cat"] * 60) + " ,"  # the comma lies 14 tokens back
    assert clip.decode(second) == " ".join(["dog"] * 30)
    far = " ".join(["cat"] * 40) + ", " + " ".join(["dog"] * 50)  # 34 tokens: too far
    (first, _), (second, _) = chunks(parse(far), clip)
    assert clip.decode(first).count("dog") == 34 and clip.decode(second).count("dog") == 16
    text = " BREAK ".join(words)
    assert [clip.decode(ids) for ids, _ in chunks(parse(text), clip)] == [
        f"{word[:4]} {word[4:]}" for word in words
    ]
    full = " ".join(["cat"] * 75)
    assert len(chunks(parse(full), clip)) == 1 and len(chunks(parse(full + " cat"), clip)) == 2
    assert len(chunks(parse(full + ","), clip)) == 2


def test_weights_stay_with_their_tokens():
    clip = Tokenizer()
    ((ids, weights),) = chunks(parse("a (red:1.5) cat"), clip)
    said = {
        clip.decode([token]): weight
        for token, weight in zip(ids, weights)
        if token not in (clip.start, clip.end)
    }
    assert said == {"a": 1.0, "red": 1.5, "cat": 1.0}
    assert weights[0] == 1 and weights[5:] == [1.0] * 72


# Schedules: run in the web UI for 10 steps


@pytest.mark.parametrize(
    "text, runs",
    [
        ("[b:c:0.25]", [("b", 3), ("c", 7)]),
        ("[b:c:1.0]", [("b", 10)]),
        ("[b:c:1]", [("b", 2), ("c", 8)]),
        ("[b:c:0]", [("c", 10)]),
        ("[b:c:12]", [("b", 10)]),
        ("[b:4]", [("", 5), ("b", 5)]),
        ("[b::4]", [("b", 5), ("", 5)]),
        ("[[a:b:0.2]:c:0.6]", [("a", 3), ("b", 4), ("c", 3)]),
        ("[a:b:5]", [("a", 6), ("b", 4)]),
        ("x [a] y", [("x [a] y", 10)]),
        (r"\[a:b:5\]", [(r"\[a:b:5\]", 10)]),
        ("([a:b:5]:1.3)", [("(a:1.3)", 6), ("(b:1.3)", 4)]),
        ("[(a:2):3]", [("", 4), ("(a:2)", 6)]),  # as its own tests have it
        ("[(red hat:1.2):0.5] cat", [(" cat", 6), ("(red hat:1.2) cat", 4)]),
        ("[cat:(dog:1.3):0.5]", [("cat", 6), ("(dog:1.3)", 4)]),
    ],
)
def test_words_change_on_the_way_as_in_the_web_ui(text, runs):
    assert schedule(text, 10) == [said for said, count in runs for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("a [b:.5] c", [("a b c", 10)]),  # what came in the first pass is there
        ("[a:b:1.5]", [("a", 6), ("b", 4)]),
        ("[a:b:25]", [("a", 6), ("b", 4)]),
        ("[a:b:15]", [("b", 10)]),
    ],
)
def test_a_second_pass_goes_on_where_the_first_has_ended(text, runs):
    """With 20 steps before 10: A1111's own tests have the first."""
    assert schedule(text, 10, before=20) == [said for said, count in runs for _ in range(count)]


def test_over_a_picture_a_share_is_of_all_steps():
    assert schedule("[a:b:0.2]", 10, drawn=4) == ["a", "a", "a", "b"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("(a (b:1.5):1.2) [red] c BREAK d", [("a ", 1.2), ("b", 1.5), (" [red] c BREAK d", 1.0)]),
        ("((x))", [("x", 1.1**2)]),
        (r"\(a\) (b\))", [("(a) ", 1.0), ("b)", 1.1)]),
        ("a) (b", [("a) (b", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("", [("", 1.0)]),
    ],
)
def test_comfyuis_brackets_are_comfyuis(text, pieces):
    found = parse_as_comfyui(text)
    assert [words for words, _ in found] == [words for words, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])
    assert parse_as_comfyui("(" * 9_000 + "x")  # these are letters: nothing closes them
    assert parse_as_comfyui("(" * 100 + "x" + ")" * 100) == [("x", pytest.approx(1.1**100))]
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        parse_as_comfyui("(" * 9_000 + "x" + ")" * 9_000)
    with pytest.raises(ValueError, match="too large"):
        parse_as_comfyui("(x:inf)")


def test_words_take_turns():
    assert "".join(schedule("[a|b]", 7)) == "aababab"
    assert schedule("[a|]x", 4) == ["ax", "ax", "x", "ax"]


def test_texts_that_are_drawn_together():
    assert together("a :1.2 AND b:0.5") == [("a", 1.2), ("b", 0.5)]
    assert together("a:1.5 b AND c") == [("a:1.5 b", 1.0), ("c", 1.0)]
    assert together("(a:1.2) AND (b:1.3)") == [("(a:1.2)", 1.0), ("(b:1.3)", 1.0)]
    assert together("band AND sand") == [("band", 1.0), ("sand", 1.0)]
    assert together("cat :0.5") == [("cat :0.5", 1.0)]


# Drawing


@pytest.mark.parametrize("rule", emphasis.RULES)
def test_without_signs_nothing_changes(pipe, rule):
    plain = pipe.generate("a cat", "dog", progress=False, **ASKED)
    asked = emphasis.request(pipe, Request("a cat", "dog", **ASKED), rule)
    assert pipe.generate(asked, progress=False)[0].tobytes() == plain.tobytes()
    assert torch.allclose(encode(pipe, "a cat", rule), pipe.encode_text(["a cat"]), atol=1e-6)


def test_a_weight_of_zero_by_comfyuis_rule_is_the_empty_text(pipe):
    found = encode(pipe, "(cat:0)", "comfyui")
    nothing = pipe.encode_text([""])
    assert torch.allclose(found[:, 1:2], nothing[:, 1:2], atol=1e-6)
    assert not torch.allclose(found[:, 2:], nothing[:, 2:], atol=1e-3)  # what comes later has seen the cat


@pytest.mark.parametrize(
    "fragments",
    [
        [("a", 1.0), ("cat", 1.4), ("dog", 1.0)],
        [("a cat", 1.0), ("dog", 0.5)],
        [("a", 0.8), ("cat", 1.0), ("dog", 0.3), ("cat", 1.2)],
        [("cat", 0.0), ("dog", 1.0)],
    ],
)
def test_compels_rule_is_compels(tmp_path, fragments):
    """compel itself, on the same text encoder in transformers."""
    compel = pytest.importorskip("compel.embeddings_provider", reason="an oracle: pip install compel")
    transformers = pytest.importorskip("transformers")
    models = random_networks(SMALL)
    save(SMALL, models, tmp_path / "model", "diffusers", WORDS)
    theirs = compel.EmbeddingsProvider(
        transformers.CLIPTokenizer.from_pretrained(tmp_path / "model" / "tokenizer"),
        transformers.CLIPTextModel.from_pretrained(tmp_path / "model" / "text_encoder"),
        model_max_length=16,
    )
    texts, weights = [[text for text, _ in fragments]], [[weight for _, weight in fragments]]
    expected = theirs.get_embeddings_for_weighted_prompt_fragments(texts, weights)
    written = " ".join(text if weight == 1 else f"({text}:{weight})" for text, weight in fragments)
    found = encode(StableDiffusion(SMALL, WORDS, models), written, "compel")
    assert torch.allclose(found, expected, atol=1e-4)
    assert models["clip"].layers[0].attention.kernel.__name__ == "attention"  # type: ignore[union-attr, index]


def test_both_sides_are_as_long_as_the_longer(pipe):
    asked = emphasis.request(pipe, Request("cat " * 40, "dog", **ASKED), "a1111")
    assert isinstance(asked.prompt, Tensor) and isinstance(asked.negative, Tensor)
    assert asked.prompt.shape == asked.negative.shape == (4, 1, 3 * 16, 24)
    # A text that is repeated is the same text for attention, as where both sides are drawn apart.
    assert torch.equal(asked.negative[0], pipe.encode_text(["dog"]).repeat(1, 3, 1))
    settings: dict[str, Any] = {"cfg": 1.0, "seed": 0, "steps": 2}
    once, repeated = (next(iter(pipe.denoise(text, **settings))) for text in ("dog", asked.negative[0]))
    assert torch.allclose(once.eps, repeated.eps, atol=1e-5)
    filled = emphasis.request(pipe, Request("cat " * 40, "dog", **ASKED), "compel")
    assert isinstance(filled.negative, Tensor)
    assert torch.equal(filled.negative[0, :, 16:32], pipe.encode_text([""]))
    pipe.generate(asked, progress=False)


def test_sides_of_many_lengths_do_not_fill_the_memory(pipe):
    def parts(*chunks: int) -> str:
        return " AND ".join(" BREAK ".join(["cat"] * many) for many in chunks)

    asked = emphasis.request(pipe, Request(parts(5, 7, 8, 9), "dog", **ASKED), "a1111")
    assert isinstance(asked.prompt, Tensor) and asked.prompt.shape[2] == 9 * 16
    odd = emphasis.request(pipe, Request(parts(9), parts(8), **ASKED), "a1111")
    assert isinstance(odd.prompt, Tensor) and odd.prompt.shape[2] == 9 * 16  # and not 72 chunks
    assert isinstance(odd.negative, Tensor)
    assert torch.equal(odd.negative[0, :, -16:], pipe.encode_text([""]))


def test_the_shorter_part_of_an_and_goes_on_with_its_last_vector(pipe):
    """As A1111's `stack_conds` has it."""
    asked = emphasis.request(pipe, Request("cat AND " + "dog " * 20, "", **ASKED), "a1111")
    assert isinstance(asked.prompt, Tensor)
    cat = pipe.encode_text(["cat"])
    assert torch.equal(asked.prompt[0, :, :16], cat)
    assert torch.equal(asked.prompt[0, :, 16:32], cat[:, -1:].expand(-1, 16, -1))


def test_a_text_that_changes_is_the_first_and_then_the_second(pipe):
    asked = emphasis.request(pipe, Request("[cat:dog:1]", **ASKED), "plain")
    cat, dog = pipe.encode_text(["cat", "dog"])
    assert isinstance(asked.prompt, Tensor)
    for turn, expected in enumerate((cat, cat, dog, dog)):
        assert torch.allclose(asked.prompt[turn, 0], expected, atol=1e-6)


def test_texts_together_are_guided_by_their_sum(pipe):
    one = pipe.generate("cat", "dog", progress=False, **ASKED)
    same = emphasis.request(pipe, Request("cat :0.5 AND cat :0.5", "dog", **ASKED), "a1111")
    alike = torch.tensor(list(one.tobytes())).float() - torch.tensor(
        list(pipe.generate(same, progress=False)[0].tobytes())
    )
    assert alike.abs().max() <= 1
    both = emphasis.request(pipe, Request("cat AND a dog :0.7", "dog", **ASKED), "a1111")
    step = next(iter(pipe.denoise(both)))
    other = step.look(pipe.encode_text(["a dog"]))
    expected = step.uncond + 3.0 * (step.cond - step.uncond) + 0.7 * 3.0 * (other - step.uncond)
    assert torch.allclose(step.output, expected, atol=1e-4)
    alone = emphasis.request(pipe, Request("cat AND cat", **(ASKED | {"cfg": 1.0})), "a1111")
    step = next(iter(pipe.denoise(alone)))
    assert torch.allclose(step.output, step.cond, atol=1e-5)


def test_the_command_draws_repeats_and_says_it_in_python(pipe, tmp_path: Path):
    save(SMALL, pipe.models, tmp_path / "model.safetensors", tokenizer=WORDS)
    line = [
        "generate",
        "a (cat:1.4) BREAK [dog|cat]",
        f"--model={tmp_path / 'model.safetensors'}",
        "--steps=3",
    ]
    line += ["--seed=2", "--dtype=fp32", "--quiet", "--hires=1.5"]
    pictures = {}
    for rule in ("a1111", "comfyui", ""):
        more = [f"--emphasis={rule}"] if rule else []
        assert (
            main(
                [
                    *line,
                    *more,
                    f"--out={tmp_path / f'{rule}.png'}" if rule else f"--out={tmp_path / 'no.png'}",
                ]
            )
            == 0
        )
        pictures[rule] = Image.open(tmp_path / f"{rule or 'no'}.png").tobytes()
    assert len(set(pictures.values())) == 3
    settings = read(tmp_path / "a1111.png").settings
    assert settings.emphasis == "a1111" and settings.prompt == "a (cat:1.4) BREAK [dog|cat]"
    names: dict[str, object] = {}
    exec(settings.as_python().replace('picture.save("picture.png")', ""), names)
    assert names["picture"].tobytes() == pictures["a1111"]  # type: ignore[attr-defined]


def test_other_families_and_bad_weights_are_refused(pipe, tmp_path, capsys):
    for given, said in (
        (["--emphasis=compell"], "emphasis must be a1111, plain, comfyui, compel"),
        ([], "is no weight"),
    ):
        line = ["generate", "a (cat:1.5.2)", "--emphasis=a1111", *given, f"--out={tmp_path / 'out'}"]
        assert main(line) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()

    class Other(StableDiffusion):
        def vectors(self, prompts, clip_skip):
            return super().vectors(prompts, clip_skip)

    other = Other(replace(SMALL, name="xl"), WORDS, pipe.models)
    with pytest.raises(ValueError, match="does not know how xl reads prompts"):
        emphasis.request(other, Request("cat", **ASKED), "a1111")
