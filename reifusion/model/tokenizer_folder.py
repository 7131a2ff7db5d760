"""A tokenizer as the `tokenizer` folder of a diffusers model, read and written as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tokenizer import END, START, Tokenizer


def read_tokenizer(path: str | Path, context_length: int = 77) -> Tokenizer:
    """Reads the `tokenizer` folder of a diffusers model: vocab.json and merges.txt, or tokenizer.json.

    Raises FileNotFoundError if it has neither, ValueError as `Tokenizer` does.
    """
    folder = Path(path)

    def content(name: str) -> dict[str, Any]:
        file = folder / name
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}

    merges: str | list[tuple[str, str]]
    whole, config = content("tokenizer.json"), content("tokenizer_config.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = content("vocab.json")
        merges = (folder / "merges.txt").read_text("utf-8")
    elif whole:
        vocabulary = whole["model"]["vocab"]
        merges = [tuple(x.split() if isinstance(x, str) else x) for x in whole["model"]["merges"]]
    else:
        raise FileNotFoundError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json")
    # Added tokens stand in one or more of three places, by the version of transformers.
    added: dict[str, Any] = {token: {"id": i} for token, i in content("added_tokens.json").items()}
    for i, token in config.get("added_tokens_decoder", {}).items():
        added[token["content"]] = {**token, "id": int(i)}
    added |= {token["content"]: token for token in whole.get("added_tokens", ())}
    special = content("special_tokens_map.json")
    written = {_content(token) for token in special.get("additional_special_tokens", ())}
    written |= {token for token, facts in added.items() if not facts.get("normalized", True)}
    pad = END
    for entry in config, special:  # the second has the last word
        pad = _content(entry.get("pad_token") or pad)
    vocabulary = vocabulary | {token: facts["id"] for token, facts in added.items()}
    return Tokenizer(merges, context_length, vocabulary=vocabulary, pad=pad, exact=written)


def write_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Writes the folder that `read_tokenizer` and `transformers.CLIPTokenizer.from_pretrained` read."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    merged = Tokenizer(tokenizer.merges_text).vocabulary.keys()
    added = {token: i for token, i in tokenizer.vocabulary.items() if token not in merged}
    vocabulary = {token: i for token, i in tokenizer.vocabulary.items() if token in merged}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{tokenizer.merges_text}\n", "utf-8")
    pad = tokenizer._tokens[tokenizer.pad]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config: dict[str, Any] = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.context_length,
    }
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added, ensure_ascii=False), "utf-8")
        config["added_tokens_decoder"] = {
            str(tokenizer.vocabulary[token]): {
                "content": token,
                "lstrip": False,
                "normalized": token in tokenizer.vocabulary.keys() - merged - {pad, *tokenizer.exact},
                "rstrip": False,
                "single_word": False,
                "special": token in (START, END, pad),
            }
            for token in (START, END, *added)
        }
    text = json.dumps({**config, **special}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, "utf-8")


def _content(token: Any) -> str:
    """A token in a JSON file of transformers, which is its text, or an object with its text."""
    return token["content"] if isinstance(token, dict) else token
