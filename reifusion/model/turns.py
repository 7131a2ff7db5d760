"""Vectors in place of words: prompts that the caller encoded, for the whole loop or for each turn of it."""

from __future__ import annotations

from torch import Tensor

from .asked import Prompt
from .request import Request


def in_each_turn(
    request: Request, encoded: tuple[Tensor, Tensor | None], turns: int
) -> list[tuple[Tensor, Tensor | None]]:
    """The words of the prompts and of the negative ones for each turn, each (B, 77, 768).

    encoded: what the text encoder says to the texts; the second is None without guidance. Vectors in a
    request stand in their place. Raises ValueError for vectors that do not fit the model or the turns.
    """
    positive, negative = encoded
    words = _for_turns(request.prompt, positive, turns, request.num)
    if negative is None:
        return [(one, None) for one in words]
    others = _for_turns(request.negative, negative, turns, request.num)
    if words[0].shape != others[0].shape:
        shapes = f"{tuple(words[0].shape)} and {tuple(others[0].shape)}"
        raise ValueError(f"prompts and negative prompts must be vectors of the same shape, not {shapes}")
    return list(zip(words, others))


def _for_turns(given: Prompt | None, encoded: Tensor, turns: int, num: int) -> list[Tensor]:
    """The words of one side for each turn, (B, 77, 768): those that were given, if they are vectors."""
    if not isinstance(given, Tensor):
        return [encoded] * turns
    if given.shape[-1] != encoded.shape[-1] or (given.ndim == 4 and len(given) != turns):
        asked = f"(B, 77, {encoded.shape[-1]}) or ({turns}, B, 77, {encoded.shape[-1]})"
        raise ValueError(f"a prompt of vectors must be {asked}, not {tuple(given.shape)}")
    given = given.to(encoded)
    if given.shape[-3] == 1:
        given = given.expand(*given.shape[:-3], len(encoded), -1, -1)
    else:
        given = given.repeat_interleave(num, dim=-3)
    return list(given) if given.ndim == 4 else [given] * turns
