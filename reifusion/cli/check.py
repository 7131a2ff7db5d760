"""`reifusion check`: the exercises of the book."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    what: Annotated[str, typer.Argument(help="exercise", show_default=False)],
    number: Annotated[
        int, typer.Argument(help="Which one; chapter 15 of the book has them.", show_default=False)
    ],
    file: Annotated[Path, typer.Argument(help="The file with your function.", show_default=False)],
) -> None:
    """Tells whether your answer to an exercise of the book is right."""
    if what != "exercise":
        raise ValueError(
            f"only an exercise can be checked, as in: reifusion check exercise 1 mine.py, and not {what!r}"
        )
    from ..explain.exercises import check as check_exercise

    right, sentence = check_exercise(number, file)
    print(sentence)
    raise typer.Exit(0 if right else 1)
