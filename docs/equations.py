"""The equations of the book: each stands in a chapter, above a line of code, and in a test.

In a chapter as `$$ … \tag{forward} $$`, in the code as a comment that begins with `# [forward]`, in
`tests/equations/` as a function under `@checks("forward")`. `python -m docs.equations` prints them all with
the error of our line against NumPy in float64, and fails if one is missing on any side.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHAPTERS = ROOT / "docs" / "book"


@dataclass
class Equation:
    id: str
    number: str = ""  # chapter.place, as "2.1"
    chapter: str = ""
    path: str = ""  # of the code, from the root of the repository
    line: int = 0  # the line that computes it
    source: str = ""  # where it is from: "Eq. 4, Ho et al. 2020"
    test_path: str = ""
    test_line: int = 0

    @property
    def place(self) -> str:
        return f"{self.path.removeprefix('reifusion/')}:{self.line}"


def chapters() -> list[str]:
    """The names of the chapters' files, in the order of the book."""
    return re.findall(r"book/([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def equations() -> list[Equation]:
    """All of them, those of the chapters first and in their order; what is missing is left empty."""
    found: dict[str, Equation] = {}
    for number, name in enumerate(chapters(), 1):
        path = CHAPTERS / name
        tags = re.findall(r"\\tag\{([\w-]+)\}", path.read_text(encoding="utf-8")) if path.exists() else []
        for place, id in enumerate(tags, 1):
            if id in found:
                raise ValueError(f"equation {id} is in {found[id].chapter} and again in {name}")
            found[id] = Equation(id, f"{number}.{place}", name)
    for path in sorted((ROOT / "reifusion").rglob("*.py")):
        _marks(path, found)
    for path in sorted((ROOT / "tests" / "equations").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
                if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "checks":
                    id = ast.literal_eval(decorator.args[0])
                    equation = found.setdefault(id, Equation(id))
                    equation.test_path, equation.test_line = path.relative_to(ROOT).as_posix(), node.lineno
    return list(found.values())


def _marks(path: Path, found: dict[str, Equation]) -> None:
    """Finds `# [id] Eq. 4, Ho et al. 2020: …` and the statement below it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        mark = re.match(r"\s*# \[([a-z][\w-]*)\] (.*?)(?:: |$)", line)
        if mark is None:
            continue
        equation = found.setdefault(mark[1], Equation(mark[1]))
        if equation.path:
            raise ValueError(f"equation {mark[1]} is at {equation.place} and again in {path.name}")
        statement = next(k for k in range(i + 1, len(lines)) if lines[k].strip() and lines[k].strip()[0] != "#")
        equation.path, equation.source = path.relative_to(ROOT).as_posix(), mark[2]
        equation.line = statement + 1


def main() -> int:
    from tests.equations.check import errors

    rows, missing, measured = equations(), 0, errors()
    print(f"{'':5} {'equation':24} {'chapter':18} {'line':32} {'test':38} error")
    for equation in rows:
        error = measured.get(equation.id)
        cells = (equation.number, equation.id, equation.chapter, equation.path and equation.place)
        test = equation.test_path and f"{Path(equation.test_path).name}:{equation.test_line}"
        print("{:5} {:24} {:18} {:32} {:38} {}".format(
            *(cell or "MISSING" for cell in (*cells, test)), "—" if error is None else f"{error:.1e}"))  # fmt: skip
        missing += not (equation.chapter and equation.path and equation.test_path and error is not None)
    print(f"{len(rows)} equations, {missing} of them missing on one side")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
