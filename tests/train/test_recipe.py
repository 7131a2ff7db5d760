"""Recipes: the built-in ones are complete, values have the right types, and a mistake is one sentence."""

import json

import pytest

from reifusion.train.__main__ import main
from reifusion.train.recipe import TRAININGS, RecipeError, find, keys, read

OURS = (
    "mini-vae",
    "mini",
    "mini-laptop-vae",
    "mini-laptop",
    "my-pictures",
    "my-vae",
    "my-finetune",
    "my-word",
    "my-dreambooth",
    "mini-sharpen",
    "tiny-vae",
    "tiny",
    "mini-flow",
    "mini-mm",
    "mini-lora",
    "sd15-finetune",
    "sd15-lora",
)


@pytest.mark.parametrize("name", OURS)
def test_built_in_recipes_can_be_read_and_say_what_they_need(name):
    file = find(name)
    comment = file.read_text().partition("train =")[0]
    assert all(f"#   {word} " in comment for word in ("needs", "takes", "expect"))
    what = next(what for what in TRAININGS if f'train = "{what}"' in file.read_text())
    recipe = read(what, file)
    assert recipe.training.loop.steps > 0 and recipe.out.endswith(".safetensors")
    # A run against the clock does as many steps as the machine can, so no loss belongs to a step.
    assert recipe.expected or recipe.training.loop.minutes is not None
    assert all(low < high for _, low, high in recipe.expected)


def test_missing_keys_have_defaults_and_the_command_line_has_the_last_word(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('train = "text2image"\nsteps = 7\nlr = 1\nmax_snr = 2.5\nexpected = [[0, 1, 2]]\n')
    recipe = read("text2image", file, ["lr=2e-4", "batch=3", "data=my pictures", "max_snr=none", "muon=true"])
    training = recipe.training
    assert (training.loop.steps, training.loop.lr, training.batch, training.loop.muon) == (7, 2e-4, 3, True)
    assert (recipe.data, training.max_snr, training.caption_dropout) == ("my pictures", None, 0.1)
    assert (recipe.folder, recipe.out) == ("runs/mine", "runs/mine/model.safetensors")
    assert recipe.expected == ((0, 1, 2),)


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("stepps = 3", [], "sets 'stepps'.*did you mean steps"),
        ("", ["quux=1"], "the command line sets 'quux'.*--keys"),
        ("steps = 'many'", [], "steps must be int, not 'many'"),
        ("", ["muon=3"], "muon must be bool, not 3"),
        ("", ["steps"], "'steps' is not key=value"),
        ("steps = = 3", [], "cannot be read"),
        ("train = 'vae'", [], "trains 'vae', not 'text2image'"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, text, overrides, says):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=says) as error:
        read("text2image", file, overrides)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_is_refused_with_a_list_of_all(tmp_path):
    with pytest.raises(
        RecipeError, match="there is no recipe 'maxi'; there are mini, mini-control, mini-flow"
    ):
        find("maxi")
    with pytest.raises(RecipeError, match="there is no recipe at"):
        find(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("what", TRAININGS)
def test_every_key_is_listed_once(what, capsys):
    assert main([what, "--keys"]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{key} ") + printed.startswith(f"{key} ") == 1 for key in keys(what))


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    assert main(["text2image", "--config", "maxi"]) == 2
    assert main(["mini", "--config", "mini"]) == 2
    assert main(["text2image", "--config", "mini", "vae="]) == 2
    assert main(["vae", "--config", "mini-vae", "--threads", "0"]) == 2
    (empty := tmp_path / "empty").mkdir()
    assert main(["vae", "--config", "mini-vae", f"data={empty}", f"folder={tmp_path}/run"]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 5 and all(line.startswith("reifusion: ") for line in errors)


def test_the_curve_is_drawn_from_the_log(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": step, "loss": 1 / (step + 1)} for step in range(0, 100, 20)]
    (folder / "training.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["text2image", "--config", "mini", f"folder={folder}", "--plot"]) == 0
    assert (folder / "training.png").stat().st_size > 1000
    assert main(["text2image", "--config", "mini", f"folder={tmp_path}/none", "--plot"]) == 1
