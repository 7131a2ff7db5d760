"""The equation behind a line: `python -m docs.equation model/ddpm.py:295` (or `make equation LINE=…`).

Prints the equation whose comment stands nearest above the line: its source, the book's LaTeX, the line that
computes it, and how far that line is from NumPy. A name such as `forward` finds the equation too.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from docs.equations import CHAPTERS, ROOT, Equation, equations


class NotFound(ValueError):
    """There is no such equation; the message says which there are, in one sentence."""


def find(what: str, known: list[Equation]) -> Equation:
    """Returns the equation with that name, or the nearest equation at or above `file:line`."""
    by_name = {equation.id: equation for equation in known}
    if what in by_name:
        return by_name[what]
    match = re.fullmatch(r"(?:reifusion/)?([\w/]+\.py):(\d+)", what)
    if match is None:
        raise NotFound(f"{what!r} is neither file.py:line nor an equation; `make equations` lists all")
    there = [equation for equation in known if equation.path.removeprefix("reifusion/") == match[1]]
    if not there:
        raise NotFound(f"no equation stands in {match[1]}; `make equations` says where they stand")
    above = [equation for equation in there if equation.mark <= int(match[2])]
    if not above:
        first = min(there, key=lambda equation: equation.mark)
        raise NotFound(
            f"line {match[2]} is above the first equation of {match[1]}, which is at {first.place}"
        )
    return max(above, key=lambda equation: equation.mark)


def latex(equation: Equation) -> str:
    """Returns the formula as it stands in the chapter; empty if the chapter has none."""
    if not equation.chapter:
        return ""
    text = (CHAPTERS / equation.chapter).read_text(encoding="utf-8")
    blocks = re.findall(r"\$\$(.+?)\$\$", text, re.S)
    tag = f"\\tag{{{equation.id}}}"
    return next((" ".join(block.replace(tag, "").split()) for block in blocks if tag in block), "")


def statement(equation: Equation) -> str:
    """Returns the comment and the line below it, without their indentation."""
    lines = (ROOT / equation.path).read_text(encoding="utf-8").splitlines()
    return "\n".join(f"    {line.strip()}" for line in lines[equation.mark - 1 : equation.line])


def error(equation: Equation) -> tuple[float, float]:
    """Returns our line's error against NumPy in float64, relative to the largest value, and the tolerance."""
    from tests.equations.check import CHECKS

    importlib.import_module(f"tests.equations.{Path(equation.test_path).stem}")
    check = CHECKS[equation.id]
    return check.error, check.within


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 1:
            raise NotFound("say a line, as in: python -m docs.equation model/ddpm.py:295")
        equation = find(arguments[0], equations())
    except NotFound as wrong:
        print(wrong, file=sys.stderr)
        return 2
    away, within = error(equation)
    print(f"({equation.number}) {equation.id}: {equation.source}\n\n    {latex(equation)}\n")
    print(f"{equation.path}, line {equation.line}:\n\n{statement(equation)}\n")
    print(f"in the book:  docs/book/{equation.chapter}")
    print(f"its test:     {equation.test_path}, line {equation.test_line}")
    print(f"against NumPy in float64: off by {away:.1e}, and {within:.0e} would be allowed")
    return 0 if away <= within else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
