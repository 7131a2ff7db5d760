"""Training: what was asked is what is trained, or one sentence says why not, before anything is encoded."""

import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reifusion.families.sdxl import SDXLConfig
from reifusion.families.sdxl_unet import SDXLUNetConfig
from reifusion.model.config import MINI, CLIPConfig, UNetConfig, VAEConfig
from reifusion.train import recipe, run, sizes, watch
from reifusion.train.__main__ import main
from reifusion.train.checkpoint import TrainingError, alone
from reifusion.train.keys import RecipeError
from reifusion.train.loop import LoopConfig, train
from reifusion.train.mini import material
from reifusion.train.plot import smoothed
from reifusion.train.vae import VAE
from reifusion.weights import load, save
from tests.sprites import NOUNS, made_up
from tests.tiny import WORDS, random_networks

TOY = replace(
    MINI,
    name="toy",
    size=32,
    clip=CLIPConfig(600, 16, 32, 1, 2),
    vae=VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=1.0),
    unet=UNetConfig(channels=(32,), attention=(1,), layers=1, heads=(2,), context_width=32, groups=8),
)
QUICK = ("batch=2", "mixed_precision=no", "log_every=1", "warmup=1")


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Adds a model that trains within a second, and draws no sheets."""
    monkeypatch.setitem(sizes.SIZES, "toy", TOY)
    monkeypatch.setattr(watch, "contact_sheet", lambda *_, **__: Image.new("RGB", (8, 8)))


def pictures(folder, colour=(200, 40, 40), count=3, caption="picture {}"):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (32, 32), tuple(c * (i + 1) // count for c in colour)).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(caption.format(i))
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a whole toy model, two VAEs of its sizes and some pictures."""
    top = tmp_path_factory.mktemp("toy")
    for name, noise in (("model", 0.0), ("other", 0.1)):
        models = random_networks(TOY)
        for p in models["diffusion"].parameters():
            p.data += noise
        save(TOY, models, top / f"{name}.safetensors", tokenizer=WORDS)
        torch.manual_seed(noise > 0)
        run.save_vae(VAE(TOY.vae), top / f"{name}-vae.safetensors")
    pictures(top / "data")
    return top


def follow(what, *keys):
    """Follows a recipe; returns its file and what was said on the way."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = run.run(recipe.read(what, None, [*QUICK, *keys]))
    return out, " | ".join(str(w.message) for w in said if w.category is UserWarning)


def lora(here, folder, *keys):
    return follow("lora", f"start={here}/model.safetensors", f"data={here}/data", "steps=2", "rank=2",
                  f"folder={folder}", *keys)  # fmt: skip


def nothing_encoded(folder):
    return not folder.exists() or not list(folder.rglob("*.safetensors"))


# Sheets


def test_sheets_are_drawn_with_the_text_encoder_that_is_in_the_file(here, tmp_path, monkeypatch):
    shown = []

    def sheet(pipe, *_, **__):
        shown.append({name: x.clone() for name, x in pipe.models["clip"].state_dict().items()})
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(watch, "contact_sheet", sheet)
    start = here / "model.safetensors"
    keys = [f"start={start}", f"data={here}/data", "steps=1", f"folder={tmp_path}"]
    out, _ = follow("text2image", *keys, "train_text_encoder=false")
    written = load(out)[1]["clip"].state_dict()
    assert all(torch.equal(shown[-1][name], x) for name, x in written.items())
    assert all(torch.equal(load(start)[1]["clip"].state_dict()[name], x) for name, x in written.items())


def test_a_random_text_encoder_cannot_stay_as_it_is(here, tmp_path):
    with pytest.raises(RecipeError, match="set start to a trained model"):
        follow("text2image", "model=toy", f"vae={here}/model-vae.safetensors", f"data={here}/data",
               f"folder={tmp_path}", "train_text_encoder=false")  # fmt: skip


# Limits


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("steps=0", "steps must be 1 or more, not 0"),
        ("steps=2.5", "steps must be int, not 2.5"),
        ("lr=nan", "lr must be 0 or more, not nan"),
        ("lr=-1", "lr must be 0 or more"),
        ("lr=inf", "lr must be 0 or more"),
        ("lr=abc", "lr must be float, not 'abc'"),
        ("warmup=-1", "warmup must be 0 or more"),
        ("decay=5", "decay must be 0 or more and at most 1, not 5.0"),
        ("betas=[0.9, 1.0]", "betas must be 0 or more and below 1"),
        ("betas=[0.9]", r"betas must be \[float, float\]"),
        ("weight_decay=nan", "weight_decay must be"),
        ("max_grad_norm=0", "max_grad_norm must be above 0, not 0.0"),
        ("ema=1", "ema must be 0 or more and below 1"),
        ("seed=-1", "seed must be 0 or more"),
        ("accumulate=0", "accumulate must be 1 or more"),
        ("mixed_precision=fp8", "mixed_precision must be bf16, fp16 or no, not 'fp8'"),
        ("explode=1", "explode must be above 1"),
        ("checkpoint_minutes=nan", "checkpoint_minutes must be"),
        ("log_every=0", "log_every must be 1 or more"),
        ("batch=0", "batch must be 1 or more"),
        ("caption_dropout=1.5", "caption_dropout must be"),
        ("timestep_power=0", "timestep_power must be above 0"),
        ("max_snr=0", "max_snr must be above 0"),
        ("max_snr=-1", "max_snr must be above 0"),
        ("offset_noise=-0.1", "offset_noise must be"),
        ("rank=0", "rank must be 1 or more"),
        ("alpha=0", "alpha must be above 0"),
        ("alpha=nan", "alpha must be above 0"),
        ("dropout=1", "dropout must be 0 or more and below 1"),
        ("targets=diffusion", "targets must be a list in brackets, of str"),
        ("targets=[3]", "targets must be str, not 3"),
        ("size=-8", "size must be 0 or more"),
        ("prediction_type=v-prediction", "prediction_type must be epsilon, v_prediction or flow"),
        ("expected=[[1, 2]]", r"expected must be \[float, float, float\]"),
        ("data=", "data is empty"),
        ("data=' '", "data is empty"),
        ("mirror=maybe", "mirror must be bool"),
        (f"batch={'9' * 400}", "batch must be 1 or more, not 999"),
        (f"lr={'9' * 400}", "lr must be 0 or more, not inf"),
    ],
)
def test_every_key_has_limits(key, says):
    with pytest.raises(RecipeError, match=says) as error:
        recipe.read("lora", None, [key])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("what", "key"),
    [("vae", "crop=0"), ("vae", "whole_from=2"), ("vae", "kl_weight=-1"), ("vae", "edges=nan"),
     ("sharpen", "critic_by=-1"), ("sharpen", "matching=inf"), ("text2image", "scenes=0"),
     ("text2image", "dtype=int4")],
)  # fmt: skip
def test_so_have_those_of_other_trainings(what, key):
    with pytest.raises(RecipeError, match=f"^{key.partition('=')[0]} must be"):
        recipe.read(what, None, [key])


@pytest.mark.parametrize("what", recipe.TRAININGS)
def test_every_number_refuses_nan(what):
    for name, (default, _) in recipe.keys(what).items():
        if isinstance(default, float):
            with pytest.raises(RecipeError, match=f"^{name} must be"):
                recipe.read(what, None, [f"{name}=nan"])


def test_limits_hold_in_python_as_well():
    with pytest.raises(RecipeError, match="steps must be 1 or more, not 0"):
        LoopConfig(steps=0)


def test_a_name_that_looks_like_a_number_is_a_name():
    assert recipe.read("lora", None, ["data=2026", "folder=2026-01-02"]).data == "2026"


def test_a_learning_rate_that_stays_low_is_said(here, tmp_path):
    _, said = lora(here, tmp_path / "a", "warmup=500", "steps=3")
    assert "reaches only" in said and "a short run needs a shorter warmup" in said
    assert "lr is 0, so nothing is learned" in lora(here, tmp_path / "b", "lr=0")[1]


# Keys that are not used


@pytest.mark.parametrize(
    ("what", "keys", "says"),
    [
        ("lora", ["vae=x"], "only for training text2image"),
        ("lora", ["scenes=5"], "only for training text2image"),
        ("vae", ["prediction_type=flow"], "only for training text2image and lora"),
        ("lora", ["learning_rate=1"], "here it is called lr"),
        ("lora", ["network_dim=4"], "here it is called rank"),
        ("lora", ["stepps=1"], "did you mean steps"),
    ],
)
def test_a_key_of_another_training_is_refused_with_the_right_name(what, keys, says):
    with pytest.raises(RecipeError, match=says):
        recipe.read(what, None, keys)


@pytest.mark.parametrize(
    ("what", "keys", "name"),
    [
        ("text2image", ["scenes=5", "data={0}/data"], "scenes"),
        ("vae", ["mirror=true", "model=toy"], "mirror"),
        ("text2image", ["size=64", "start={0}/model.safetensors"], "size"),
        ("text2image", ["model=sd15", "data={0}/data", "start={0}/model.safetensors"], "model"),
        ("text2image", ["max_snr=3", "prediction_type=flow", "start={0}/model.safetensors", "data={0}/data"],
         "max_snr"),
        ("vae", ["caption_column=text", "data={0}/data", "model=toy"], "caption_column"),
    ],
)  # fmt: skip
def test_a_key_that_would_have_no_effect_is_refused(here, tmp_path, what, keys, name):
    with pytest.raises(RecipeError, match=f"^{name} is set but would not be used: "):
        follow(what, f"folder={tmp_path}", *(key.format(here) for key in keys))


@pytest.mark.slow
def test_a_caption_that_no_picture_needs_is_said(here, tmp_path):
    keys = ["steps=1", f"validation_data={here}/data"]
    _, said = lora(here, tmp_path / "own", "caption=a zork", *keys)
    assert said.count("caption is set to 'a zork' and not used") == 1
    silent = pictures(tmp_path / "silent", caption="")
    _, said = lora(here, tmp_path / "silent run", "caption=a zork", f"data={silent}", *keys)
    assert "not used" not in said and "get 'a zork'" in said


def test_a_lora_learns_for_the_prediction_type_that_is_asked_for(here, tmp_path):
    plain, epsilon = (
        load_file(lora(here, tmp_path / name, *more)[0])
        for name, more in (("v", []), ("e", ["prediction_type=epsilon"]))
    )
    assert not all(torch.equal(x, epsilon[name]) for name, x in plain.items())


def test_only_a_training_that_is_stopped_resumes(tmp_path, monkeypatch, capsys):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "read", stop)
    assert main(["lora", "--overfit-one"]) == main(["lora"]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "reifusion: stopped",
        "reifusion: stopped; the same command resumes from here",
    ]


def test_one_thing_is_done_instead_of_training(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["lora", "--plot", "--dry-run", f"folder={tmp_path}"])
    assert "--dry-run: not allowed with argument --plot" in capsys.readouterr().err


@pytest.mark.parametrize("what", recipe.TRAININGS)
def test_keys_explains_each_key(what, capsys):
    assert main([what, "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipe.keys(what)) and all(len(line.split()) > 4 for line in lines)
    assert any("steps" in line and "(1 or more)" in line for line in lines)


# Resuming


def test_a_folder_has_one_run_at_a_time(here, tmp_path):
    left = tmp_path / "run" / ".checkpoint.pt.123"  # of a run that was killed while it wrote
    left.parent.mkdir()
    left.touch()
    with alone(tmp_path / "run"):
        assert not left.exists()
        with pytest.raises(TrainingError, match=r"another run is training in .*choose another folder"):
            lora(here, tmp_path / "run")
    lora(here, tmp_path / "run")


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("reifusion.train.checkpoint.fcntl", None)
    half = tmp_path / ".checkpoint.pt.123"  # perhaps of a run that is writing it
    half.touch()
    with alone(tmp_path):
        assert half.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("alpha=64", "alpha (from 8 to 64)"),
        ("prediction_type=epsilon", "prediction_type (from v_prediction to epsilon)"),
        ("start={0}/other.safetensors", "base model"),
        ("data={0}/dogs", "data"),
        ("caption=a blip", "data"),
    ],
)
def test_a_lora_resumes_only_what_it_was(here, tmp_path, change, says):
    bare = pictures(tmp_path / "bare", caption="")
    if not (here / "dogs").exists():
        pictures(here / "dogs", (0, 40, 220), 5)
    begun = [f"data={bare}", "caption=a zork"] if "caption" in change else []
    first = load_file(lora(here, tmp_path / "run", *begun)[0])
    with pytest.raises(TrainingError) as error:
        lora(here, tmp_path / "run", *begun, change.format(here))
    assert says in str(error.value) and "allow_changes=true" in str(error.value)
    out, said = lora(here, tmp_path / "run", *begun, change.format(here), "steps=3", "allow_changes=true")
    assert "goes on all the same" in said
    assert not all(torch.equal(x, first[name]) for name, x in load_file(out).items())


@pytest.mark.parametrize(
    ("change", "says"),
    [("prediction_type=epsilon", "prediction_type"), ("vae={0}/other-vae.safetensors", "VAE")],
)
def test_so_does_a_whole_model(here, tmp_path, change, says):
    keys = ["model=toy", f"vae={here}/model-vae.safetensors", f"data={here}/data", f"folder={tmp_path}"]
    follow("text2image", *keys, "steps=1")
    with pytest.raises(TrainingError, match=says):
        follow("text2image", *keys, "steps=2", change.format(here))


@pytest.mark.parametrize("what", ["lora", "text2image"])
def test_pictures_of_what_must_not_change_are_told_by_what_they_are(here, tmp_path, what):
    others = pictures(tmp_path / "others")
    keys = [f"start={here}/model.safetensors", f"data={here}/data", f"folder={tmp_path}/run"]
    follow(what, *keys, "steps=1", f"regularisation={others}")
    moved = others.rename(tmp_path / "moved")
    follow(what, *keys, "steps=2", f"regularisation={moved}")
    Image.new("RGB", (32, 32)).save(moved / "new.png")
    with pytest.raises(TrainingError, match="these have changed: regularisation;"):
        follow(what, *keys, "steps=3", f"regularisation={moved}")


def test_what_is_done_is_not_undone_by_fewer_steps(tmp_path):
    def loss(network, step, generator, part):
        return network(torch.ones(1, 2)).pow(2).mean(), {"samples": 1.0}

    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    train(model, loss, LoopConfig(steps=8, mixed_precision="no"), tmp_path)
    with pytest.warns(
        UserWarning, match="nothing is left to train: 8 steps were done before, and steps is 5"
    ):
        train(model, loss, LoopConfig(steps=5, mixed_precision="no"), tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 8


def test_a_new_weight_decay_counts_after_a_resume(tmp_path):
    def weights(name, *decays):
        torch.manual_seed(0)
        for steps, decay in enumerate(decays, 1):
            model = torch.nn.Linear(2, 2)
            config = LoopConfig(
                steps=2 * steps, decay=0, weight_decay=decay, mixed_precision="no", warmup=0, lr=0.1
            )
            train(model, lambda n, *_: (n(torch.ones(1, 2)).mean() * 0 + 1, {}), config, tmp_path / name)
        return model.weight

    light, heavy = weights("light", 0.0, 0.0), weights("heavy", 0.0, 5.0)
    assert heavy.norm() < 0.5 * light.norm()


# Files made on the way


def test_latents_of_another_vae_or_of_other_scenes_are_not_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(material, "read_library", lambda: made_up(NOUNS[:4], 32))
    monkeypatch.setattr(material, "SHARD", 3)
    torch.manual_seed(0)
    one, two = (VAE(TOY.vae).eval().encoder for _ in range(2))
    scenes = material.bank(7)

    def encode(encoder, scenes) -> torch.Tensor:
        return material.encode(encoder, scenes, tmp_path)

    first = encode(one, scenes)
    assert first.shape[0] == 7 and len(list(tmp_path.iterdir())) == 3
    assert not torch.equal(first, encode(two, scenes))
    monkeypatch.setattr(material, "SEED", 2)
    assert not torch.equal(first, encode(one, material.bank(7)))
    before = len(list(tmp_path.iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(material, "render", None)  # nothing is drawn again
        assert torch.equal(first, encode(one, scenes))
    assert len(list(tmp_path.iterdir())) == before
    assert torch.equal(first, material.encode(one, scenes))  # and without files


def test_a_longer_bank_begins_with_the_scenes_of_a_shorter_one(monkeypatch):
    monkeypatch.setattr(material, "read_library", lambda: made_up(NOUNS[:4], 32))
    short, long = material.bank(3), material.bank(8)
    assert len(short) == 3 and len(long) == 8 and long.captions[:3] == short.captions
    assert short.digest() != long.digest()


def test_scenes_are_encoded_only_while_there_is_time(monkeypatch):
    monkeypatch.setattr(material, "read_library", lambda: made_up(NOUNS[:4], 32))
    monkeypatch.setattr(material, "SHARD", 2)
    torch.manual_seed(0)
    encoder, scenes = VAE(TOY.vae).eval().encoder, material.bank(7)
    few = material.encode(encoder, scenes, seconds=0.0)
    assert len(few) == 2 and torch.equal(few, material.encode(encoder, scenes)[:2])


def test_the_vocabulary_is_that_of_the_captions(here, tmp_path):
    one = pictures(tmp_path / "one", caption="aaaa bbbb aaaa bbbb")
    two = pictures(tmp_path / "two", caption="zeppelin zeppelin zeppelin")
    keys = ["model=toy", f"vae={here}/model-vae.safetensors", "steps=1", f"folder={tmp_path}/run"]
    follow("text2image", *keys, f"data={one}")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert len(load(follow("text2image", *keys, f"data={two}")[0])[2].tokenize("zeppelin")) == 1
    again = load(follow("text2image", *keys, f"data={one}", "allow_changes=true")[0])[2]
    assert len(again.tokenize("zeppelin")) == 1  # resumed: what tokens mean has been learned


# A VAE


@pytest.mark.parametrize("keys", [["batch=1"], ["batch=6", "accumulate=2"], ["batch=3"]])
def test_any_batch_lasts_to_the_end_of_a_vae(here, tmp_path, keys):
    follow("vae", "model=toy", f"data={here}/data", "crop=16", "steps=5", f"folder={tmp_path}", *keys)
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("keys", [["size=33"], ["crop=17"]])
def test_sides_that_a_vae_cannot_halve_are_refused(here, tmp_path, keys):
    with pytest.raises(RecipeError, match="must be a multiple of 2 for this VAE"):
        follow("vae", "model=toy", f"data={here}/data", f"folder={tmp_path}", *keys)


def test_a_vae_that_goes_on_keeps_its_latents_and_says_what_moves_them(here, tmp_path):
    keys = ["model=toy", f"start={here}/model-vae.safetensors", f"data={here}/data", "crop=16", "steps=1"]
    out, said = follow("vae", *keys, "lr=0", f"folder={tmp_path}/a")
    assert "U-Net" in said and "`train sharpen` keeps them" in said
    start, end = load_file(here / "model-vae.safetensors"), load_file(out)
    assert all(torch.equal(x, end[name]) for name, x in start.items())
    moved = load_file(follow("vae", *keys, "lr=0", "normalise=true", f"folder={tmp_path}/b")[0])
    assert not torch.equal(start["encoder.quant.weight"], moved["encoder.quant.weight"])


def test_pictures_smaller_than_a_crop_are_named(here, tmp_path):
    _, said = follow("vae", "model=toy", f"data={here}/data", "crop=64", "steps=1", f"folder={tmp_path}")
    assert "3 of 3 pictures are smaller than 64×64 pixels" in said and "0.png" in said


# Before anything is encoded


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (['targets=["foo"]'], "no layer matches 'foo'"),
        (["targets=[]"], "targets is empty"),
        (["rank=100000"], "rank must be at most 32"),
        (["size=1"], "size must be 2 or more for this VAE"),
        (["accumulate=3"], "cannot be cut into 3 equal parts"),
        (["prediction_type=epsilon", "zero_terminal_snr=true"], "zero_terminal_snr is for"),
        (["out={0}"], "out is a folder"),
        (["out={0}/model"], "out must be the name of a .safetensors file"),
        (["out={0}/file.txt/x.safetensors"], "is a file where a folder is needed"),
        (["folder={0}/file.txt"], "is a file where a folder is needed"),
        (
            ["data={0}", "folder={0}/runs/one"],
            "lies in .*, and its sheets would become pictures to learn from",
        ),
        (["regularisation={0}"], "and its sheets would become pictures to learn from"),
        (['prompts=["{0}/file.txt"]'], "there are no prompts in"),
    ],
)
def test_what_cannot_be_done_is_found_at_once(here, tmp_path, keys, says):
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError, match=says):
        lora(here, tmp_path / "run", *(key.format(tmp_path) for key in keys))
    assert nothing_encoded(tmp_path / "run")
    assert main(["lora", "--dry-run", f"start={here}/model.safetensors", f"folder={tmp_path}/run",
                 *(key.format(tmp_path) for key in keys)]) == 2  # fmt: skip


def test_the_model_to_begin_with_is_not_overwritten(here, tmp_path):
    with pytest.raises(RecipeError, match="would overwrite it; choose another out"):
        lora(here, tmp_path, f"out={here}/model.safetensors")


@pytest.mark.parametrize("what", ["lora", "text2image"])
@pytest.mark.parametrize("channels", [5, 8])
def test_a_model_with_more_channels_is_refused_in_one_sentence(here, tmp_path, what, channels, capsys):
    config = replace(TOY, unet=replace(TOY.unet, in_channels=channels))
    save(config, random_networks(config), tmp_path / "wide.safetensors", tokenizer=WORDS)
    keys = [f"start={tmp_path}/wide.safetensors", f"data={here}/data", f"folder={tmp_path}/run"]
    assert main([what, *QUICK, *keys]) == 2
    error = capsys.readouterr().err
    assert f"has {channels} input channels" in error and "Traceback" not in error
    assert nothing_encoded(tmp_path / "run")


def test_a_distilled_model_is_not_trained_as_if_it_were_not(here, tmp_path):
    config = replace(TOY, unet=replace(TOY.unet, guidance_width=32))
    save(config, random_networks(config), tmp_path / "lcm.safetensors", tokenizer=WORDS)
    with pytest.raises(RecipeError, match="distilled model"):
        follow("lora", f"start={tmp_path}/lcm.safetensors", f"data={here}/data", f"folder={tmp_path}/run")


# What is written and drawn


def test_small_changes_are_not_rounded_away(here, tmp_path):
    keys = [f"start={here}/model.safetensors", f"data={here}/data", "steps=1"]
    for dtype in ("fp32", "bf16"):
        out, _ = follow("text2image", *keys, f"dtype={dtype}", f"folder={tmp_path}/{dtype}")
        assert {x.dtype for x in load_file(out).values()} == {run.DTYPES[dtype]}
    # Left open, it is that of the model to begin with, and fp32 from nothing.
    assert run.dtype_of(recipe.read("text2image")) == torch.float32
    for kind in (torch.bfloat16, torch.int8, torch.float16):
        config, models, tokenizer = load(here / "model.safetensors")
        start = tmp_path / f"{kind}.safetensors"
        save(config, models, start, tokenizer=tokenizer, dtype=kind)
        assert run.dtype_of(recipe.read("text2image", None, [f"start={start}"])) == kind


@pytest.mark.parametrize(
    ("dtype", "lr", "told"), [("bf16", 1e-6, True), ("bf16", 0.1, False), ("fp32", 1e-6, False)]
)
def test_a_change_that_rounding_loses_is_said(here, tmp_path, dtype, lr, told):
    keys = [f"start={here}/model.safetensors", f"data={here}/data", "steps=3", "ema=0", "decay=0"]
    _, said = follow("text2image", *keys, f"dtype={dtype}", f"lr={lr}", f"folder={tmp_path}")
    assert ("rounding to torch.bfloat16 loses much of them: its error is" in said) == told


def test_the_curve_of_a_short_run_falls_with_its_loss():
    drawn = smoothed([0.8 - 0.06 * i for i in range(10)])
    assert drawn[0] > 0.7 and drawn[-1] < 0.35


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_train_mini_gives_each_stage_a_folder_and_the_file_to_the_last(device):
    from reifusion.train.__main__ import MINI as STAGES
    from reifusion.train.__main__ import _of_stage

    stages = STAGES[device]

    def stage(i, *overrides):
        what, name = stages[i]
        mine = _of_stage(stages, what, [*overrides], {each: recipe.keys(each) for each, _ in stages})
        return recipe.read(what, recipe.find(name), mine)

    vae, whole = (stage(i, "folder=my/runs", "out=my.safetensors") for i in range(2))
    assert vae.folder != whole.folder and vae.out == whole.vae and whole.out == "my.safetensors"
    assert stage(0).folder == f"runs/{stages[0][1]}" and stage(1, "out=x.safetensors").out == "x.safetensors"
    assert stage(0).out == stage(1).vae
    assert stage(0, "crop=24").training.crop == 24 and stage(1, "crop=24").training.batch > 0
    assert stage(0, "steps=7").training.loop.steps == stage(1, "steps=7").training.loop.steps == 7
    with pytest.raises(RecipeError, match="cropz"):
        stage(1, "cropz=24")


def test_a_model_of_another_family_is_refused_in_one_sentence(here, tmp_path, capsys):
    sizes = SDXLConfig(
        name="xl", size=TOY.size, clip=TOY.clip, clip_2=TOY.clip, vae=TOY.vae, pooled=8, waves=8
    )
    unet = replace(TOY.unet, context_width=2 * TOY.clip.width, linear_projection=True)
    config = replace(sizes, unet=SDXLUNetConfig(**vars(unet)))
    save(config, random_networks(config), tmp_path / "xl.safetensors", tokenizer=WORDS)
    keys = [f"start={tmp_path}/xl.safetensors", f"data={here}/data", f"folder={tmp_path}/run"]
    for what in ("lora", "text2image"):
        assert main([what, *QUICK, *keys]) == 2
        error = capsys.readouterr().err
        assert "of the family sdxl, whose training is not built in" in error and "Traceback" not in error
        assert nothing_encoded(tmp_path / "run")
