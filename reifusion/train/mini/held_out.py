"""Pairs that training never shows, so that drawing them takes understanding: the same on every machine."""

from __future__ import annotations

import hashlib


def held_out_style(subject: str, style: str) -> bool:
    """True if training never shows the subject in this computed style, as for 5 % of all pairs."""
    return _hash(f"style/{style}/{subject}") < 0.05


def held_out_colour(subject: str, colour: str) -> bool:
    """True if training never shows the subject in this colour, as for 4 % of all pairs."""
    return _hash(f"colour/{colour}/{subject}") < 0.04


def held_out_place(subject: str, place: str) -> bool:
    """True if training never shows the subject in this place, as for 5 % of all pairs."""
    return _hash(f"place/{place}/{subject}") < 0.05


def held_out_look(subject: str, look: str) -> bool:
    """True if training never shows the subject by the hands of this look, as for 4 % of all pairs but 3d."""
    return look != "3d" and _hash(f"look/{look}/{subject}") < 0.04


def _hash(text: str) -> float:
    """Maps a text to a number in [0, 1), evenly, and to the same number on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
