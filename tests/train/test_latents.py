"""Buckets, and latents that are encoded once."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from reifusion.model.config import VAEConfig
from reifusion.model.encoder import Encoder
from reifusion.model.pictures import fit, to_tensor
from reifusion.model.tokenizer import Tokenizer
from reifusion.train import latents
from reifusion.train.images import DataError, Item, Pictures
from reifusion.train.latents import LatentData, bucket_of, buckets, cache_latents, remove_unused, weights_hash

CONFIG = VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4, scale_factor=0.5)
SIZE = 64  # buckets of 8-pixel steps


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # good data causes no warning
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer([], context_length=12)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(CONFIG)


class Counting(Encoder):
    """Counts the pictures that it encodes."""

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        self.count = 0

    def moments(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.count += len(image)
        return super().moments(image)


@pytest.fixture
def counting() -> Counting:
    torch.manual_seed(0)
    return Counting(CONFIG)


def noise(seed: int, width: int, height: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def in_memory(files: list[bytes], captions: Sequence[tuple[str, ...]] | None = None) -> Pictures:
    items = []
    for i, data in enumerate(files):
        try:
            size = Image.open(io.BytesIO(data)).size
        except OSError:
            size = (SIZE, SIZE)
        items.append(Item(i, f"{i}.png", *size, captions[i] if captions else (f"no {i}",)))
    return Pictures(files.__getitem__, items)


SQUARE, WIDE, TALL = (64, 64), (80, 48), (48, 80)


def files_of(*sizes: tuple[int, int]) -> list[bytes]:
    return [noise(i, 2 * width, 2 * height) for i, (width, height) in enumerate(sizes)]


# ---- buckets ----------------------------------------------------------------------------------------------


def test_the_buckets_of_stable_diffusion_and_of_the_mini() -> None:
    assert buckets(512) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert buckets(128, 16) == [(96, 160), (112, 144), (128, 128), (144, 112), (160, 96)]


sides = st.integers(1, 64).flatmap(lambda step: st.tuples(st.integers(step, 12 * step), st.just(step)))


@settings(deadline=None)
@given(sides, st.floats(1, 4))
def test_buckets_are_the_largest_sizes_that_obey_the_rules(side: tuple[int, int], most: float) -> None:
    area_side, step = side
    sizes = buckets(area_side, step, most)

    def allowed(w: int, h: int) -> bool:
        return w * h <= area_side**2 and max(w, h) <= most * min(w, h)

    assert sizes == sorted(set(sizes)) and set(sizes) == {(h, w) for w, h in sizes}
    for w, h in sizes:
        assert w % step == h % step == 0 and allowed(w, h)
        assert not allowed(w + step, h) and not allowed(w, h + step) and not allowed(w + step, h + step)
    if area_side % step == 0:
        assert (area_side, area_side) in sizes


@given(sides, st.integers(1, 5000), st.integers(1, 5000))
def test_a_picture_goes_into_the_bucket_nearest_in_shape(
    side: tuple[int, int], width: int, height: int
) -> None:
    sizes = buckets(*side)
    w, h = bucket_of(width, height, sizes)
    wrong = max(width * h / (height * w), height * w / (width * h))  # the factor by which a side is cropped
    assert all(wrong <= 1.000001 * max(width * y / (height * x), height * x / (width * y)) for x, y in sizes)
    assert (w, h) in sizes


@given(sides, st.integers(1, 5000), st.integers(1, 5000))
def test_turning_a_picture_turns_its_bucket(side: tuple[int, int], width: int, height: int) -> None:
    sizes = buckets(*side)
    w, h = bucket_of(width, height, sizes)
    distances = sorted(abs(math.log(width / height) - math.log(x / y)) for x, y in sizes)
    assume(len(distances) == 1 or distances[1] - distances[0] > 1e-9)
    assert bucket_of(height, width, sizes) == (h, w)


@pytest.mark.parametrize("side, step, most", [(63, 64, 2.0), (512, 0, 2.0), (512, -8, 2.0), (512, 64, 0.9)])
def test_no_buckets_is_an_error(side: int, step: int, most: float) -> None:
    with pytest.raises(ValueError, match="no bucket has"):
        buckets(side, step, most)


# ---- latents are those of the encoder ---------------------------------------------------------------------


def test_a_batch_is_what_the_encoder_would_sample(
    encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert encoder.quant.bias is not None
    encoder.quant.bias.detach()[4:] += 1.0  # a σ that matters
    pictures = in_memory(files_of(WIDE))
    data = cache_latents(encoder, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    drawn, tokens = data.latent_batch(torch.Generator().manual_seed(3), 5)
    generator = torch.Generator().manual_seed(3)
    torch.multinomial(torch.ones(1, dtype=torch.float64), 1, generator=generator)
    torch.randint(1, (5,), generator=generator)
    x = to_tensor(fit(pictures[0][0], *WIDE)).expand(5, -1, -1, -1)
    with torch.no_grad():
        expected = encoder(x, torch.randn(5, 4, 6, 10, generator=generator))
    assert drawn.dtype == torch.float32 and drawn.shape == (5, 4, 6, 10)
    assert (drawn - expected).abs().max() < 2e-3 * expected.abs().max()  # stored in 16 bits
    assert drawn.std(dim=0).min() > 0.05  # a new sample each time
    assert tokens.tolist() == [tokenizer.encode("no 0")] * 5
    assert data.empty.tolist() == tokenizer.encode("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_memory_format_and_precision_will_do(
    encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path, dtype: torch.dtype
) -> None:
    pictures = in_memory(files_of(WIDE, WIDE))
    plain = cache_latents(encoder, pictures, SIZE, tmp_path / "plain", tokenizer=tokenizer)
    odd = encoder.to(dtype).to(memory_format=torch.channels_last)
    data = cache_latents(odd, pictures, SIZE, tmp_path / "odd", tokenizer=tokenizer)
    if dtype == torch.float32:  # the same weights, so the same key
        assert {f.parent.parent.name for f in data.files} == {f.parent.parent.name for f in plain.files}
    (x, _), (y, _) = (each.latent_batch(torch.Generator().manual_seed(0), 4) for each in (plain, data))
    assert (x - y).abs().max() < (0.01 if dtype == torch.float32 else 0.1)


def test_latents_can_be_learned_from(encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = cache_latents(encoder, in_memory(files_of(SQUARE)), SIZE, tmp_path, tokenizer=tokenizer)
    drawn, tokens = data.latent_batch(torch.Generator(), 2)
    embedding, weight = torch.nn.Embedding(tokenizer.vocab_size, 1), torch.ones(4, 1, 1, requires_grad=True)
    ((weight * drawn).square().mean() + embedding(tokens).mean()).backward()
    assert weight.grad is not None and weight.grad.abs().min() > 0


def test_a_batch_has_one_shape_and_buckets_come_as_often_as_they_have_pictures(
    encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pictures = in_memory(files_of(WIDE, SQUARE, WIDE, TALL, WIDE, WIDE))
    data = cache_latents(encoder, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    assert len(data) == 6 and data.sizes == {TALL: 1, SQUARE: 1, WIDE: 4}
    generator = torch.Generator().manual_seed(0)
    seen: Counter = Counter()
    shapes: Counter = Counter()
    for _ in range(600):
        batch, tokens = data.latent_batch(generator, 2)
        shapes[tuple(batch.shape)] += 1
        for words in tokens.tolist():
            seen[tokenizer.decode(words)] += 1
            wide = tokenizer.decode(words) in ("no 0", "no 2", "no 4", "no 5")
            assert wide == (tuple(batch.shape[2:]) == (6, 10))  # captions stay with their pictures
    assert set(shapes) == {(2, 4, 10, 6), (2, 4, 8, 8), (2, 4, 6, 10)}
    assert 360 < shapes[2, 4, 6, 10] < 440 and 70 < shapes[2, 4, 8, 8] < 130
    assert set(seen) == {f"no {i}" for i in range(6)} and min(seen.values()) > 140  # of 200 expected


def test_batches_depend_on_the_generator_alone(
    encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Nor do they depend on the order in which pictures came into the cache."""
    files = files_of(WIDE, SQUARE, WIDE, SQUARE)
    captions = [(f"no {i}", f"number {i}") for i in range(4)]
    whole = in_memory(files, captions)
    cache_latents(encoder, in_memory(files[2:], captions[2:]), SIZE, tmp_path / "b", tokenizer=tokenizer)
    a, b = (cache_latents(encoder, whole, SIZE, tmp_path / name, tokenizer=tokenizer) for name in "ab")
    for seed in range(10):
        (x, words), (y, same) = (data.latent_batch(torch.Generator().manual_seed(seed), 3) for data in (a, b))
        assert torch.equal(words, same) and (x - y).abs().max() < 1e-2
        again, _ = a.latent_batch(torch.Generator().manual_seed(seed), 3)
        assert torch.equal(x, again)


def test_one_of_several_captions_is_drawn(encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pictures = in_memory(files_of(SQUARE), [("a", "b", "c")])
    data = cache_latents(encoder, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    _, tokens = data.latent_batch(torch.Generator().manual_seed(0), 300)
    assert all(70 < n < 130 for n in Counter(map(tokenizer.decode, tokens.tolist())).values())
    assert set(map(tokenizer.decode, tokens.tolist())) == {"a", "b", "c"}


def test_mirrored_pictures_are_encoded_too(counting: Counting, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pictures = in_memory(files_of(SQUARE))
    cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    data = cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer, mirror=True)
    assert counting.count == 2 and len(data) == 1 and data.sizes == {SQUARE: 2}
    x = to_tensor(fit(pictures[0][0], *SQUARE))
    with torch.no_grad():
        means = torch.cat([counting.moments(x)[0], counting.moments(x.flip(-1))[0]])
    (rows,) = data._buckets
    assert all((row.mean[row.number] - mean).abs().max() < 5e-3 for (row, _), mean in zip(rows, means))
    assert (means[0] - means[1]).abs().max() > 0.05


# ---- encoded again or not ---------------------------------------------------------------------------------


def test_nothing_is_encoded_twice(counting: Counting, tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = files_of(WIDE, SQUARE, TALL)
    pictures = in_memory([*files, files[0]])  # the same picture twice
    for _ in range(2):
        data = cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer)
        assert counting.count == 3 and len(data) == 4


def test_a_new_or_changed_picture_is_all_that_is_encoded(
    counting: Counting, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    files = files_of(*[SQUARE] * 5)
    cache_latents(counting, in_memory(files), SIZE, tmp_path, tokenizer=tokenizer)
    cache_latents(counting, in_memory([*files, noise(99, 64, 64)]), SIZE, tmp_path, tokenizer=tokenizer)
    assert counting.count == 6
    cache_latents(counting, in_memory([noise(98, 64, 64), *files[1:]]), SIZE, tmp_path, tokenizer=tokenizer)
    assert counting.count == 7


def test_a_touched_file_is_encoded_anew(counting: Counting, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    pictures = Pictures(lambda row: file, [Item(0, "a.png", 64, 64, ("a",))])

    def mean_after(change: bytes, time: float) -> torch.Tensor:
        file.write_bytes(change.ljust(20_000, b"\0"))  # the same size, with other contents
        os.utime(file, (time, time))
        data = cache_latents(counting, pictures, SIZE, tmp_path / "cache", tokenizer=tokenizer)
        ((row, _),) = data._buckets[0]
        return row.mean[row.number].clone()

    old, same = mean_after(noise(0, 64, 64), 1e9), mean_after(noise(0, 64, 64), 1e9)
    assert counting.count == 1 and torch.equal(old, same)
    new = mean_after(noise(1, 64, 64), 1e9 + 1)
    assert counting.count == 2 and not torch.equal(old, new)


def test_one_weight_of_the_vae_makes_all_latents_anew(
    counting: Counting, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pictures = in_memory(files_of(SQUARE, WIDE))
    old = cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    with torch.no_grad():
        counting.conv_out.weight[0, 0, 0, 0] += 1e-6
    new = cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    assert counting.count == 4 and not old.files & new.files
    assert weights_hash(counting) != weights_hash(counting.half())


def test_a_changed_caption_is_used_and_nothing_encoded(
    counting: Counting, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    files = files_of(SQUARE)
    cache_latents(counting, in_memory(files, [("old",)]), SIZE, tmp_path, tokenizer=tokenizer)
    data = cache_latents(counting, in_memory(files, [("new",)]), SIZE, tmp_path, tokenizer=tokenizer)
    assert (
        counting.count == 1
        and tokenizer.decode(data.latent_batch(torch.Generator(), 1)[1][0].tolist()) == "new"
    )


def test_another_size_is_another_latent(counting: Counting, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pictures = in_memory(files_of(SQUARE))
    small = cache_latents(counting, pictures, 32, tmp_path, tokenizer=tokenizer)
    large = cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    assert list(small.sizes) == [(32, 32)] and list(large.sizes) == [SQUARE] and counting.count == 2


def test_files_that_are_no_longer_used_can_be_removed(
    counting: Counting, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    wide, square = (in_memory([file]) for file in files_of(WIDE, SQUARE))
    cache_latents(counting, wide, SIZE, tmp_path, tokenizer=tokenizer)
    with torch.no_grad():
        counting.conv_in.weight[0] += 1
    cache_latents(counting, wide, SIZE, tmp_path, tokenizer=tokenizer)
    data = cache_latents(counting, square, SIZE, tmp_path, tokenizer=tokenizer)
    (tmp_path / "my notes.txt").write_text("keep")
    assert remove_unused(tmp_path, data) == 2
    left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {Path("my notes.txt"), *(file.relative_to(tmp_path) for file in data.files)}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [weights_hash(counting)]
    assert (
        data.latent_batch(torch.Generator(), 1)[0].shape == (1, 4, 8, 8)
        and remove_unused(tmp_path, data) == 0
    )


# ---- errors -----------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_named_in_one_warning(
    encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = noise(0, 128, 128)
    files = [whole, whole[: len(whole) // 2], noise(1, 32, 64), noise(2, 128, 128)]
    pictures = in_memory(files, [("fine",), ("broken",), ("small",), ("long " * 20, "short")])
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            data = cache_latents(encoder, pictures, SIZE, tmp_path, tokenizer=tokenizer)
        (message,) = [str(warning.message) for warning in caught]
        assert "1 of 4 pictures cannot be read and are left out: 1.png" in message
        assert "1 of 4 pictures are too small for an area of 64×64 pixels, and are enlarged: 2.png" in message
        assert "1 of 4 pictures have a caption of more than 10 tokens, which is cut: 3.png" in message
        assert len(data) == 3
    tokens = data.latent_batch(torch.Generator().manual_seed(0), 100)[1].tolist()
    assert tokens[0][0] == tokenizer.start and all(len(words) == 12 for words in tokens)
    assert "broken" not in map(tokenizer.decode, tokens)


def test_a_file_that_is_gone_is_left_out(encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(noise(0, 64, 64))
    items = [Item(i, f"{i}.png", 64, 64, ("x",)) for i in range(2)]
    pictures = Pictures(lambda row: tmp_path / f"{row}.png", items)
    with pytest.warns(UserWarning, match="1 of 2 pictures cannot be read and are left out: 1.png"):
        assert len(cache_latents(encoder, pictures, SIZE, tmp_path / "cache", tokenizer=tokenizer)) == 1


def test_no_picture_left_is_an_error(encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 2 pictures can be read"):
        cache_latents(encoder, in_memory([b"", b"no"]), SIZE, tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("size, step", [(64, 12), (64, 72), (4, None), (64, -8)])
def test_steps_that_no_vae_could_take(
    encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path, size: int, step: int | None
) -> None:
    with pytest.raises(DataError, match="must be a multiple of 8 up to"):
        cache_latents(encoder, in_memory(files_of(SQUARE)), size, tmp_path, tokenizer=tokenizer, step=step)


def test_latents_that_are_not_finite_are_not_kept(
    encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert encoder.quant.bias is not None
    encoder.quant.bias.detach()[0] = 1e5  # too large for 16 bits
    with pytest.raises(DataError, match=r"in torch\.float32, gives latents that are not finite"):
        cache_latents(encoder, in_memory(files_of(SQUARE)), SIZE, tmp_path, tokenizer=tokenizer)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_file_is_made_again(counting: Counting, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pictures = in_memory(files_of(SQUARE, WIDE))
    data = cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    before = data.latent_batch(torch.Generator().manual_seed(0), 4)
    damaged = min(data.files)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    del data
    data = cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer)
    assert counting.count == 3 and len(data) == 2
    assert all(
        torch.equal(a, b) for a, b in zip(data.latent_batch(torch.Generator().manual_seed(0), 4), before)
    )


def test_a_full_disk_is_one_clear_sentence_and_leaves_nothing_half(
    encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latents, "write_tensors", full)
    with pytest.raises(DataError, match=r"latents cannot be written to .*: .*No space left on device"):
        cache_latents(encoder, in_memory(files_of(SQUARE)), SIZE, tmp_path, tokenizer=tokenizer)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_killed_run_resumes_where_it_was(counting: Counting, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The process kills itself while it writes its third file."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch, test_latents as t
        from reifusion.train import latents
        torch.manual_seed(0)
        latents.PER_FILE, written, save = 2, [], latents.write_tensors
        def write_tensors(tensors, path, metadata):
            save(tensors, path, metadata)
            written.append(path)
            if len(written) == 3:
                os.truncate(path, 1000)
                os.kill(os.getpid(), signal.SIGKILL)
        latents.write_tensors = write_tensors
        pictures = t.in_memory(t.files_of(*[t.SQUARE] * 9))
        tokenizer = t.Tokenizer([], context_length=12)
        latents.cache_latents(
            t.Encoder(t.CONFIG), pictures, t.SIZE, t.Path({str(tmp_path)!r}), tokenizer=tokenizer
        )
    """
    code = textwrap.dedent(script)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(list(tmp_path.rglob("[!.]*.safetensors"))) == 2
    data = cache_latents(counting, in_memory(files_of(*[SQUARE] * 9)), SIZE, tmp_path, tokenizer=tokenizer)
    assert counting.count == 9 - 2 * 2 and len(data) == 9


def test_many_pictures_are_many_files_but_one_set(
    counting: Counting, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "PER_FILE", 3)
    pictures = in_memory(files_of(*[SQUARE] * 8))
    data: LatentData = cache_latents(counting, pictures, SIZE, tmp_path, tokenizer=tokenizer, batch=2)
    assert len(data.files) == 3 and data.sizes == {SQUARE: 8} and counting.count == 8
    for i, (row, number) in enumerate(data._buckets[0]):
        with torch.no_grad():
            mean, log_variance = counting.moments(to_tensor(fit(pictures[i][0], *SQUARE)))
        assert number == i and (row.mean[row.number] - mean[0]).abs().max() < 5e-3
        assert (row.std[row.number] - log_variance[0].mul(0.5).exp()).abs().max() < 5e-3
        with safe_open(row.file, "pt") as file:
            assert file.get_tensor("mean").dtype == torch.float16


def test_the_pictures_of_a_batch_can_be_named(encoder: Encoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pictures = in_memory(files_of(*[(32, 32)] * 5))
    data = cache_latents(encoder, pictures, 32, tmp_path, tokenizer=tokenizer)
    named = data.describe(torch.Generator().manual_seed(3), 2)
    chosen = [item.name for item in pictures.items if item.name in named]
    assert named.startswith("pictures ") and 1 <= len(chosen) <= 2
