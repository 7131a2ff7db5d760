"""The equation behind a line: `python -m docs.equation model/ddpm.py:308` (or `make equation LINE=…`).

Prints the equation whose comment stands nearest above the line: its source, the book's formula, the line that
computes it, and how far that line is from NumPy. A name such as `forward` finds the equation too.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import textwrap
from pathlib import Path
from unicodedata import normalize

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


SIGNS = {
    "epsilon": "ε", "alpha": "α", "beta": "β", "sigma": "σ", "mu": "μ", "theta": "θ", "lambda": "λ",
    "gamma": "γ", "omega": "ω", "tau": "τ", "rho": "ρ", "ell": "ℓ", "nabla": "∇", "sum": "Σ", "prod": "Π",
    "int": "∫", "odot": "⊙", "otimes": "⊗", "cdot": "·", "cdots": "···", "dots": "…", "infty": "∞",
    "in": "∈", "sim": "~", "mid": "|", "leftarrow": "←", "approx": "≈", "le": "≤", "times": "×", "top": "ᵀ",
    "circ": "∘", "quad": "  ", "qquad": "    ",
    "sqrt": "√", "lfloor": "⌊", "rfloor": "⌋", "Sigma": "Σ", "varepsilon": "ε", "phi": "φ", "pi": "π",
    "Longleftrightarrow": "⟺", "varnothing": "∅",
}  # fmt: skip
OVER = {"bar": "\u0304", "hat": "\u0302", "tilde": "\u0303"}


def readable(formula: str) -> str:
    """Returns a formula of LaTeX as plain text for a terminal: \\frac{a}{b} is (a) / (b)."""
    text = re.sub(r"\\(left|right|textstyle|[bB]igl?|[bB]igr?)(?![a-z])", "", formula)
    text = re.sub(r"\\[,;!]", " ", text)
    text = re.sub(r"\\(?:text|mathrm|mathbb|mathcal|textstyle)\s*{([^{}]*)}", r"\1", text)
    text = re.sub(r"\\[td]?frac\s*(\d)\s*(\d)", r"\1/\2", text)
    text = re.sub(r"\\(bar|hat|tilde)\s*\\?([a-zA-Z]+)", lambda m: _over(m[1], m[2]), text)
    for _ in range(6):  # from the innermost braces outwards
        text = re.sub(r"\\[td]?frac\s*{([^{}]*)}\s*{([^{}]*)}", r"(\1) / (\2)", text)
        text = re.sub(r"\\sqrt\s*{([^{}]*)}", lambda m: f"√{m[1]}" if len(m[1]) < 3 else f"√({m[1]})", text)
        text = re.sub(r"([_^]){([^{}]*)}", lambda m: m[1] + (m[2] if len(m[2]) < 2 else f"({m[2]})"), text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda m: SIGNS.get(m[1], m[1]), text)
    text = re.sub(r"[\\{}]", "", text.replace("\\|", "‖"))
    return normalize("NFC", " ".join(text.split()))


def _over(sign: str, name: str) -> str:
    """A letter with a bar, a hat or a tilde."""
    return SIGNS.get(name, name)[0] + OVER[sign] + SIGNS.get(name, name)[1:]


def statement(equation: Equation) -> str:
    """Returns the comment and the statement below it, indented by four."""
    text = (ROOT / equation.path).read_text(encoding="utf-8")
    ends = [
        node.end_lineno or node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.stmt) and node.lineno == equation.line and not hasattr(node, "body")
    ]
    lines = text.splitlines()[equation.mark - 1 : max([equation.line, *ends])]
    return textwrap.indent(textwrap.dedent("\n".join(lines)), "    ")


def error(equation: Equation) -> tuple[float, float]:
    """Returns our line's error against NumPy in float64, relative to the largest value, and the tolerance."""
    from tests.equations.check import CHECKS

    importlib.import_module(f"tests.equations.{Path(equation.test_path).stem}")
    check = CHECKS[equation.id]
    return check.error, check.within


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 1:
            raise NotFound("say a line, as in model/ddpm.py:308, or a name, as in reverse-step")
        equation = find(arguments[0], equations())
    except NotFound as wrong:
        print(wrong, file=sys.stderr)
        return 2
    away, within = error(equation)
    print(f"({equation.number}) {equation.id}: {equation.source}\n\n    {readable(latex(equation))}\n")
    print(f"{equation.path}, from line {equation.mark}:\n\n{statement(equation)}\n")
    print(f"in the book:  docs/book/{equation.chapter}")
    print(f"its test:     {equation.test_path}, line {equation.test_line}")
    print(f"against NumPy in float64: off by {away:.1e}, and {within:.0e} would be allowed")
    return 0 if away <= within else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
