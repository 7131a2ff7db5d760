"""Textual inversion: a new word, as vectors that were learned from pictures.

The model stays as it is; a few vectors join those of the words that its text encoder knows. `load_embedding`
reads the small file, `teach` gives the word to a model, and `train/inversion.py` learns one.
Source: Gal et al. 2022, "An Image is Worth One Word", arXiv:2208.01618.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..files import whole
from ..model.clip import CLIP
from ..model.tensors import ModelError, TensorFile, _unpickle
from ..model.tokenizer import END_OF_WORD, Tokenizer
from .writing import write_tensors

if TYPE_CHECKING:
    from ..model.pipeline import StableDiffusion

# The names of the vectors in files that do not name the word, by the programs that write them.
NAMELESS = ("emb_params", "*", "clip_l", "clip_g", "string_to_param.*")
SECOND = "clip_g"  # where a word has vectors for two text encoders, those for the second


@dataclass(frozen=True)
class Embedding:
    """A word that was learned."""

    word: str
    vectors: Tensor  # (n, width of the text encoder)
    path: str = "the embedding"  # for messages
    second: Tensor | None = None  # (n, width of the second text encoder), for models that have two


def load_embedding(source: str | Path, word: str = "") -> Embedding:
    """Reads a `.safetensors`, or a `.pt` or `.bin`, as AUTOMATIC1111 or diffusers writes it.

    word: what it is called in prompts; "": as the file says, or else the file's own name. No code in the file
    is run. Raises ModelError, in one sentence, for a file that is no embedding.
    """
    path = Path(source)
    tensors, called = _read(path)
    return embedding_of(tensors, path, word or called)


def embedding_of(tensors: Mapping[str, Tensor], path: Path, word: str = "") -> Embedding:
    """Makes a word of the tensors of a file. word: "" for the tensor's name, or else the file's.

    Raises ModelError for tensors that are no word's.
    """
    found = {n: x for n, x in tensors.items() if x.ndim in (1, 2) and x.numel() and x.is_floating_point()}
    # one vector is (width,) in some files
    shaped = {name: x.detach().float().reshape(-1, x.shape[-1]) for name, x in found.items()}
    second = shaped.pop(SECOND, None)
    if len(shaped) != 1 or len(found) != len(tensors):
        raise ModelError(f"{path} is not an embedding, which is vectors (n, width) under one name")
    ((name, vectors),) = shaped.items()
    if second is not None and len(second) != len(vectors):
        counts = f"{len(vectors)} for the first text encoder and {len(second)} for the second"
        raise ModelError(f"{path} has different numbers of vectors: {counts}")
    if not all(x.numel() and x.isfinite().all() for x in (vectors, vectors if second is None else second)):
        raise ModelError(f"{path} is damaged: its vectors are not finite numbers")
    return Embedding(word or (path.stem if name in NAMELESS else name), vectors, str(path), second)


def _read(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """Returns the tensors of a file, and the word if it names one apart from them."""
    opened = TensorFile(path)
    if opened.shapes:
        return {name: stored.read() for name, stored in opened.tensors().items()}, ""
    content: Mapping[str, Any] = _unpickle(path)  # AUTOMATIC1111's has a dict in a dict
    inner = content.get("string_to_param")
    if not isinstance(inner, Mapping):
        raise ModelError(f"{path} is not an embedding")
    called = content.get("name")
    tensors = {str(name): x for name, x in inner.items() if isinstance(x, Tensor)}
    return tensors, called if isinstance(called, str) else ""


def save_embedding(embedding: Embedding, path: str | Path) -> None:
    """Writes a file that AUTOMATIC1111, ComfyUI and diffusers read: the vectors under the word.

    Those for two text encoders stand under "clip_l" and "clip_g", and the file's name is the word.
    """
    tensors = {embedding.word: embedding.vectors}
    if embedding.second is not None:
        tensors = {"clip_l": embedding.vectors, SECOND: embedding.second}
    with whole(path) as temporary:
        write_tensors({name: x.float().contiguous() for name, x in tensors.items()}, temporary)


def teach(pipe: StableDiffusion, embedding: Embedding) -> None:
    """Gives a model the word. Of three text encoders, the third reads its letters.

    Raises ValueError if its vectors do not fit, or the model knows such a word.
    """
    path, name = embedding.path, pipe.config.name
    parts = {"clip": embedding.vectors}
    if "clip_2" in pipe.models:
        if embedding.second is None:
            raise ModelError(f"{path} has vectors for one text encoder, and {name} has more")
        parts["clip_2"] = embedding.second
    elif embedding.second is not None:
        raise ModelError(f"{path} has vectors for two text encoders, and {name} has one")
    tables = {part: cast(CLIP, pipe.models[part]).embedding.token for part in parts}
    for part, vectors in parts.items():
        if vectors.shape[1] != (width := tables[part].embedding_dim):
            which = f"is for text encoders of {vectors.shape[1]} numbers a word"
            raise ModelError(f"{path} {which}, and that of {name} has {width}")
    many = tables["clip"].num_embeddings
    try:
        pipe.tokenizer = with_word(pipe.tokenizer, embedding.word, range(many, many + len(embedding.vectors)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}, as in {Path(path).name}:name") from None
    for part, vectors in parts.items():
        clip, table = cast(CLIP, pipe.models[part]), tables[part]
        with torch.no_grad():
            weight = torch.cat([table.weight, vectors.to(table.weight)])
        clip.embedding.token = nn.Embedding.from_pretrained(weight, freeze=not table.weight.requires_grad)
        clip.config = replace(clip.config, vocab_size=len(weight))
        pipe.config = replace(cast(Any, pipe.config), **{part: clip.config})


def with_word(tokenizer: Tokenizer, word: str, ids: Sequence[int]) -> Tokenizer:
    """Returns a tokenizer that knows one word more, as these ids. Raises ValueError for a known token."""
    names = [word, *(f"{word}_{k}" for k in range(1, len(ids)))]
    if not word.strip():
        raise ValueError("a new word must have letters")
    if known := [name for name in names if {name, f"{name}{END_OF_WORD}"} & tokenizer.vocabulary.keys()]:
        raise ValueError(f"{known[0]!r} is a word that the model knows already; give another name")
    vocabulary = tokenizer.vocabulary | dict(zip(names, ids))
    pad = next(token for token, i in tokenizer.vocabulary.items() if i == tokenizer.pad)
    return Tokenizer(
        "\n" + tokenizer.merges_text,  # in the first line, "#version" would be no merge
        tokenizer.context_length,
        vocabulary=vocabulary,
        pad=pad,
        exact=tokenizer.exact,
    )
