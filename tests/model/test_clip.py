"""What the tokenizer and the text encoder promise, whatever the reference does."""

from __future__ import annotations

import copy
import gzip
import json
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch

from reifusion.model.clip import CLIP, quick_gelu
from reifusion.model.config import MINI, CLIPConfig
from reifusion.model.tokenizer import DATA, END, START, Piece, Tokenizer, clip_merges, split_words
from reifusion.model.tokenizer_folder import read_tokenizer, write_tokenizer
from reifusion.train.bpe import train_bpe

TINY = CLIPConfig(vocab_size=99, context_length=12, width=32, layers=3, heads=2)
CAT = "c a\nca t</w>\nt h\nth e</w>\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(TINY).requires_grad_(False).eval()


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(1))


# Tokenizer


def test_a_prompt_is_start_words_end_and_padding_with_the_end_token(tokenizer: Tokenizer):
    ids = tokenizer.encode("a photo of a cat")
    assert len(ids) == 77 and ids[:7] == [49406, 320, 1125, 539, 320, 2368, 49407] and set(ids[7:]) == {49407}
    assert tokenizer.encode("") == [49406] + [49407] * 76
    assert tokenizer.decode(ids) == "a photo of a cat"


def test_a_cut_prompt_keeps_its_end_token_and_the_warning_names_what_was_cut(tokenizer: Tokenizer):
    with pytest.warns(
        UserWarning, match=r"82 tokens .* 75, .*: the last seven words stand out here$"
    ) as caught:
        ids = tokenizer.encode("cat " * 75 + "the last seven words stand out here")
    assert ids == [49406] + [2368] * 75 + [49407]
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode("cat " * 75) == ids


def test_case_and_white_space_do_not_matter(tokenizer: Tokenizer):
    assert tokenizer.encode("  A\tphoto\n\nof a\u3000CAT ") == tokenizer.encode("a photo of a cat")


def test_html_entities_are_left_alone(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.tokenize("salt &amp; pepper")) == "salt & amp ; pepper"


def test_special_tokens_within_a_prompt_are_special(tokenizer: Tokenizer):
    assert tokenizer.tokenize(f"a{START}cat{END}") == [320, tokenizer.start, 2368, tokenizer.end]
    assert tokenizer.end not in tokenizer.tokenize(END.upper())


def test_half_a_surrogate_pair_is_no_reason_to_fail(tokenizer: Tokenizer):
    assert tokenizer.tokenize("cat \ud83d") == tokenizer.tokenize("cat ?")


def test_each_token_knows_its_word(tokenizer: Tokenizer):
    pieces = tokenizer.pieces("A photorealistic cat, it's 42 🦒")
    assert pieces[0] == Piece(320, "a", "a", 0)
    assert [piece.id for piece in pieces] == tokenizer.tokenize("A photorealistic cat, it's 42 🦒")
    assert list(dict.fromkeys(piece.word for piece in pieces)) == [
        *("a", "photorealistic", "cat", ",", "it", "'s", "4", "2", "🦒")
    ]
    for word in {piece.word for piece in pieces} - {"🦒"}:
        assert "".join(piece.text for piece in pieces if piece.word == word) == word
    indices = [piece.word_index for piece in pieces]
    assert indices == sorted(indices) and set(indices) == set(range(9))
    assert tokenizer.pieces("cat cat")[1].word_index == 1


def test_decoding_an_unknown_id_says_so(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="49408 is not"):
        tokenizer.decode([320, 49408])
    assert tokenizer.decode(torch.tensor([49406, 320, 2368, 49407])) == "a cat"


def test_long_words_take_no_time(tokenizer: Tokenizer):
    """A Chinese sentence is one word. 3,000 signs in 9,000 bytes must not take minutes."""
    text = "".join(chr(0x4E00 + i * 7 % 20000) for i in range(3000))
    assert tokenizer.decode(tokenizer.tokenize(text)) == text


def test_vendored_merges_are_clip_s():
    merges = clip_merges()
    assert len(merges) == 48_894 == 49_408 - 2 * 256 - 2
    assert merges[:3] == [("i", "n"), ("t", "h"), ("a", "n")] and len(set(merges)) == len(merges)
    assert (DATA / "clip_merges.txt.gz").stat().st_size < 300_000
    assert "OpenAI" in (DATA / "CLIP_LICENSE").read_text("utf-8")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("header", ["", "#version: 0.2\n"])
def test_a_merges_file_makes_a_tokenizer(tmp_path: Path, header: str, compress: bool):
    content = (header + CAT).encode()
    path = tmp_path / "merges"
    path.write_bytes(gzip.compress(content) if compress else content)
    tokenizer = Tokenizer.from_file(path, context_length=6)
    assert tokenizer.vocab_size == 512 + 4 + 2 and not tokenizer.is_standard
    assert tokenizer.encode("The cat") == [516, 515, 513, 517, 517, 517]
    assert Tokenizer(tokenizer.merges_text, 6).encode("The cat") == tokenizer.encode("The cat")
    assert Tokenizer([("c", "a"), ("ca", "t</w>")]).tokenize("cat") == [513]


def test_merges_that_are_no_pairs_are_named():
    with pytest.raises(ValueError, match=r"line 2 .*'ca'"):
        Tokenizer("c a\nca\n")
    with pytest.raises(ValueError, match="2 or more"):
        Tokenizer(CAT, context_length=1)


def test_a_hash_sign_may_be_merged():
    assert Tokenizer("# #</w>\n").tokenize("##") == [512]


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        read_tokenizer(tmp_path)


def test_a_vocabulary_without_its_tokens_says_so(tmp_path: Path):
    write_tokenizer(Tokenizer(CAT), tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    del vocabulary["cat</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=r"1 tokens .* 'cat</w>'"):
        read_tokenizer(tmp_path)


def test_a_folder_may_order_the_vocabulary_otherwise(tmp_path: Path):
    write_tokenizer(Tokenizer(CAT), tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    shifted = {token: (i + 7) % len(vocabulary) for token, i in vocabulary.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(shifted))
    tokenizer = read_tokenizer(tmp_path, 6)
    assert tokenizer.tokenize("the cat") == [shifted["the</w>"], shifted["cat</w>"]]
    assert tokenizer.end == shifted[END] and tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_a_tokenizer_travels_to_another_process(tokenizer: Tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a cat") == tokenizer.encode("a cat")
    assert copy.deepcopy(tokenizer).encode("a cat") == tokenizer.encode("a cat")


def test_words_depend_on_our_tables_and_not_on_python_s():
    """U+31350 is a letter since Unicode 15, which Python 3.10 and 3.11 do not have."""
    assert split_words("a\U00031350b\U00011f50") == ["a\U00031350b", "\U00011f50"]


# Training a vocabulary


def test_the_most_frequent_pair_is_merged_first_and_equals_in_alphabetical_order():
    # ab 3 times, then (ab, c</w>) and (x, y</w>) twice each, then (ab, d</w>) once.
    assert train_bpe(["abc xy", "abc abd", "xy"], 3) == [("a", "b"), ("ab", "c</w>"), ("x", "y</w>")]


def test_training_ends_when_every_word_is_one_token():
    merges = train_bpe(["a cat", "the cat!"], 100)
    assert len(merges) < 10 and len(Tokenizer(merges).tokenize("the cat! a")) == 4
    assert train_bpe([], 10) == train_bpe(["a b c"], 10) == train_bpe(["cat"], 0) == []


def test_training_depends_on_the_words_only_and_not_on_their_order():
    texts = ["the red cat on the mat", "a dog, a cat and a bird", "thé rouge 12", "a red car"]
    assert train_bpe(reversed(texts), 40) == train_bpe(texts, 40)


def test_a_learned_vocabulary_is_what_applying_it_gives():
    """The words that it was learned from come apart as they stood when learning ended."""
    texts = ["banana bandana cabana", "ban an ana", "banana"]
    tokenizer = Tokenizer(train_bpe(texts, 6))
    assert tokenizer.decode(tokenizer.tokenize(texts[0])) == texts[0]
    assert len(tokenizer.tokenize("banana")) < len("banana")


# Text encoder


def test_each_token_becomes_a_vector(clip: CLIP):
    assert clip(random_tokens(2, 12)).shape == (2, 12, 32)
    assert clip(random_tokens(1, 5)).shape == (1, 5, 32)


def test_no_token_sees_a_later_one(clip: CLIP):
    tokens = random_tokens(2, 12)
    other = tokens.clone()
    other[:, 8] = (tokens[:, 8] + 1) % TINY.vocab_size
    before, after = clip(tokens), clip(other)
    assert torch.equal(before[:, :8], after[:, :8])
    assert ((before - after).abs().amax(dim=-1)[:, 8:] > 1e-3).all()


def test_a_shorter_sequence_gives_the_same_vectors(clip: CLIP):
    tokens = random_tokens(2, 12)
    torch.testing.assert_close(clip(tokens[:, :5]), clip(tokens)[:, :5])


def test_too_many_tokens_or_layers_to_skip_is_an_error(clip: CLIP):
    with pytest.raises(ValueError, match="13 tokens"):
        clip(random_tokens(1, 13))
    for skip in (-1, 3):
        with pytest.raises(ValueError, match=f"0 to 2, not {skip}"):
            clip(random_tokens(1, 12), skip=skip)


def test_skipped_layers_are_the_last_and_the_norm_stays(clip: CLIP):
    x = clip.embedding(random_tokens(1, 12))
    for layer in clip.layers[:2]:
        x = layer(x)
    assert torch.equal(clip(random_tokens(1, 12), skip=1), clip.norm(x))


def test_quick_gelu_is_near_gelu_and_not_it():
    x = torch.linspace(-6, 6, 1001)
    difference = (quick_gelu(x) - torch.nn.functional.gelu(x)).abs().max()
    assert 0.01 < difference < 0.03


def test_parameter_names_are_those_of_the_converter():
    with torch.device("meta"):
        names = {re.sub(r"layers\.\d+", "layers.#", name) for name in CLIP(TINY).state_dict()}
    blocks = ("norm_1", "norm_2", "attention.qkv", "attention.out", "linear_1", "linear_2")
    layers = {f"layers.#.{block}.{kind}" for block in blocks for kind in ("weight", "bias")}
    assert names == {"embedding.token.weight", "embedding.position", "norm.weight", "norm.bias"} | layers


def test_fresh_weights_train():
    """The mini's encoder: unit-scale output, and a gradient for every parameter."""
    torch.manual_seed(0)
    clip = CLIP(MINI.clip)
    tokens = torch.randint(MINI.clip.vocab_size, (2, MINI.clip.context_length))
    output = clip(tokens)
    assert 0.9 < output.std() < 1.1
    assert clip.embedding.token.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert clip.embedding.position.std().item() == pytest.approx(0.01, rel=0.05)
    (output * torch.randn_like(output)).sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in clip.parameters())


def test_other_dtypes_work_and_other_activations_do_not():
    clip = CLIP(TINY).bfloat16()
    assert clip(random_tokens(1, 12)).dtype == torch.bfloat16
    with pytest.raises(KeyError):
        CLIP(CLIPConfig(activation="relu"))
