"""Exercises: our answers are right, every common mistake is named, and uncheckable files get one sentence."""

import inspect
import textwrap

import pytest
import torch

from reifusion.explain import exercises
from reifusion.explain.exercises import EXERCISES, ExerciseError, check
from reifusion.model.attention import softmax_attention
from reifusion.model.ddpm import DDPMSampler
from reifusion.model.diffusion import sinusoids


@pytest.mark.parametrize("number", EXERCISES)
def test_our_own_answer_is_right(tmp_path, number):
    answer = EXERCISES[number].answer
    file = tmp_path / "mine.py"
    file.write_text(f"from reifusion.explain.exercises import {answer.__name__}\n")
    assert check(number, file) == (True, f"right: {EXERCISES[number].signature} agrees with reifusion's")


def test_our_answers_are_what_the_networks_and_samplers_do():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=draw) for _ in range(3))
    torch.testing.assert_close(exercises.attention(q, k, v), softmax_attention(q, k, v)[0])
    t = torch.tensor([0.0, 7.0, 999.0])
    torch.testing.assert_close(exercises.time_embedding(t, 32), sinusoids(t, 32))
    sampler, x0, noise = DDPMSampler(None), q[0], k[0]
    ratio = sampler.alphas_cumprod[400].item()
    x_t = exercises.add_noise(x0, ratio, noise)
    torch.testing.assert_close(x_t, sampler.add_noise(x0, 400, noise))
    torch.testing.assert_close(exercises.predict_x0(x_t, noise, ratio), sampler.predict(400, x_t, noise)[0])


@pytest.mark.parametrize(("number", "what"), [(n, what) for n, e in EXERCISES.items() for what in e.mistakes])
def test_every_common_mistake_is_wrong_and_named(tmp_path, number, what):
    name = EXERCISES[number].answer.__name__
    file = tmp_path / "mine.py"
    file.write_text(
        "from reifusion.explain.exercises import EXERCISES\n"
        f"{name} = EXERCISES[{number}].mistakes[{what!r}]\n"
    )
    assert check(number, file) == (False, f"not yet: {what}")


def write(tmp_path, code):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(code))
    return file


def test_an_uncommon_mistake_is_measured(tmp_path):
    guess = "def add_noise(x0, alpha_bar, noise): return {}"
    assert "its shape is (4, 3, 3)" in check(1, write(tmp_path, guess.format("x0[0]")))[1]
    assert "a tensor of shape" in check(1, write(tmp_path, guess.format("None")))[1]
    twice = guess.format("2 * (alpha_bar**0.5 * x0 + (1 - alpha_bar)**0.5 * noise)")
    assert check(1, write(tmp_path, twice)) == (False, "not yet: it is 2 times what it should be")
    assert "off by up to" in check(1, write(tmp_path, guess.format("x0")))[1]


def test_a_tensor_where_a_number_is_wanted_is_told_so(tmp_path):
    code = "def kl(mean, log_variance): return mean"
    name = EXERCISES[10].answer.__name__
    right, said = check(10, write(tmp_path, code.replace("kl", name)))
    assert not right and "one number was expected" in said


def test_a_function_that_fails_or_changes_its_arguments_is_told_so(tmp_path):
    file = write(tmp_path, "def add_noise(x0, alpha_bar, noise): return x0.nothing")
    assert check(1, file)[1].startswith("add_noise fails: AttributeError")
    file = write(tmp_path, "def add_noise(x0, alpha_bar, noise): return x0.mul_(alpha_bar**0.5)")
    assert "changes the tensors" in check(1, file)[1]
    assert "does not run: SyntaxError" in check(1, write(tmp_path, "def add_noise(:"))[1]
    assert "does not run: SystemExit" in check(1, write(tmp_path, "raise SystemExit"))[1]


def test_a_file_that_cannot_be_checked_gets_one_sentence(tmp_path):
    for number, file, says in (
        (99, "mine.py", "there is no exercise 99"),
        (1, "none.py", "there is no file"),
        (2, "mine.py", "has no function predict_x0"),
    ):
        write(tmp_path, "add_noise = print")
        with pytest.raises(ExerciseError, match=says):
            check(number, tmp_path / file)


def test_inputs_depend_on_their_seed_alone():
    for exercise in EXERCISES.values():
        one, other = (exercise.inputs(torch.Generator().manual_seed(1)) for _ in range(2))
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other))
        assert len(one) == len(inspect.signature(exercise.answer).parameters)
