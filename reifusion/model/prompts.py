"""Words of a prompt that mean something in other programs, and nothing here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from .sentences import cut

# <lora:zork:0.8>, (cat:1.3), ((cat)), [cat] and [cat:dog:0.5], BREAK
SYNTAX = re.compile(r"<\w+:[^<>]*>|\([^()]*:\s*[\d.]+\s*\)|\(\([^()]+\)\)|\[[^\[\]]+\]|\bBREAK\b")


def warn_of_syntax(prompts: Iterable[str]) -> None:
    """Warns of LoRAs, weights and breaks in the language of AUTOMATIC1111's web UI."""
    found = dict.fromkeys(found[0] for prompt in prompts for found in SYNTAX.finditer(prompt))
    if found:
        said = cut(", ".join(" ".join(one.split()) for one in found), 120)
        loras = "; a LoRA has a setting of its own" if any(one.startswith("<lora:") for one in found) else ""
        more = any(not one.startswith("<") for one in found)
        read = "; emphasis, as in --emphasis a1111, reads weights and breaks" if more else ""
        warnings.warn(f"in the prompt, {said} counts as plain words{loras}{read}", stacklevel=2)
