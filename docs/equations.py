"""The equations of the book: each stands in a chapter, above a line of code, and in a test.

In a chapter as `$$ … \tag{forward} $$`, in the code as a comment that begins with `# [forward]`, in
`tests/equations/` as a function under `@checks("forward")`. `python -m docs.equations` prints them all with
the error of our line against NumPy in float64, and fails if one is missing on any side, or wrong. With
`--readme` it also writes the README's table anew, after lines have moved.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from reifusion.files import write_text

ROOT = Path(__file__).parent.parent
CHAPTERS = ROOT / "docs" / "book"

# The README's table: its equations, in words.
README = {
    "reparameterisation": "z = μ + σ ⊙ ε, the reparameterisation trick",
    "kl": "D_KL(N(μ, σ²) ‖ N(0, 1))",
    "betas": "√βₜ in a straight line, Stable Diffusion's schedule",
    "forward": "q(xₜ \\| x₀) = N(√ᾱₜ x₀, (1 − ᾱₜ) I), the forward process",
    "x0-from-eps": "x₀ from xₜ and ε",
    "posterior-mean": "μ̃ₜ, the mean of the reverse step",
    "posterior-variance": "β̃ₜ, the variance of the reverse step",
    "reverse-step": "xₜ₋₁ = μ̃ₜ + √β̃ₜ z, the reverse step",
    "velocity": "v = αₜ ε − σₜ x₀, the velocity",
    "zero-snr": "nothing but noise at the schedule's end",
    "attention": "softmax(Q Kᵀ / √d) V, attention",
    "multi-head": "several heads side by side",
    "time-embedding": "10000^(−i / half), the frequencies of the time embedding",
    "geglu": "(xW + b) ⊗ GELU(xV + c), the feed-forward",
    "guidance": "ε_uncond + s (ε_cond − ε_uncond), guidance",
    "ddim": "DDIM's step",
    "euler": "Euler's step in σ",
    "heun": "Heun's step in σ",
    "karras-sigmas": "Karras's spacing of σ",
    "dpmpp-2m": "DPM-Solver++ 2M",
    "ancestral": "Euler's step to less noise, then fresh noise",
    "ddpm-loss": "the loss of a training step",
    "min-snr": "min-SNR weights of the loss",
    "lora": "W x + α/r B A x, a LoRA",
    "flow-path": "x = (1 − σ) x₀ + σ ε, rectified flow's straight line",
    "flow-euler": "rectified flow's step",
    "daam": "which word made which pixel",
}


@dataclass
class Equation:
    id: str
    number: str = ""  # chapter and place, such as "2.1"
    chapter: str = ""
    path: str = ""  # of the code, from the root of the repository
    mark: int = 0  # the line of the comment
    line: int = 0  # the line that computes it
    source: str = ""  # the paper: "Eq. 4, Ho et al. 2020"
    test_path: str = ""
    test_line: int = 0

    @property
    def place(self) -> str:
        return f"{self.path.removeprefix('reifusion/')}:{self.line}"


def chapters() -> dict[str, str]:
    """Returns the names of the chapters' files with their numbers, in the order of the book."""
    navigation = (ROOT / "docs" / "contents.md").read_text(encoding="utf-8")
    return {name: number for number, name in re.findall(r"- \[(\d+) .*\]\(book/([\w-]+\.md)\)", navigation)}


def equations() -> list[Equation]:
    """Returns all equations, those of the chapters first and in their order; missing fields are empty."""
    found: dict[str, Equation] = {}
    for name, number in chapters().items():
        path = CHAPTERS / name
        tags = re.findall(r"\\tag\{([\w-]+)\}", path.read_text(encoding="utf-8")) if path.exists() else []
        for place, id in enumerate(tags, 1):
            if id in found:
                raise ValueError(f"equation {id} is in {found[id].chapter} and again in {name}")
            found[id] = Equation(id, f"{number}.{place}", name)
    for path in sorted([*(ROOT / "reifusion").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]):
        _marks(path, found)
    for path in sorted((ROOT / "tests" / "equations").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
                if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "checks":
                    id = ast.literal_eval(decorator.args[0])
                    equation = found.setdefault(id, Equation(id))
                    equation.test_path = path.relative_to(ROOT).as_posix()
                    equation.test_line = decorator.lineno
    return list(found.values())


def _marks(path: Path, found: dict[str, Equation]) -> None:
    """Finds `# [id] Eq. 4, Ho et al. 2020: …` and the statement below it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        mark = re.match(r"\s*# \[([a-z][\w-]*)\] (.*?)(?:: |:?$)", line)
        if mark is None:
            continue
        equation = found.setdefault(mark[1], Equation(mark[1]))
        if equation.path:
            raise ValueError(f"equation {mark[1]} is at {equation.place} and again in {path.name}")
        statement = next(
            k for k in range(i + 1, len(lines)) if lines[k].strip() and lines[k].strip()[0] != "#"
        )
        equation.path, equation.source = path.relative_to(ROOT).as_posix(), mark[2]
        equation.mark, equation.line = i + 1, statement + 1


def write_readme(path: Path = ROOT / "README.md") -> None:
    """Writes the table anew: the equations that `README` names, their sources, and their current lines."""
    head = "| equation | source | line |\n|---|---|---|\n"
    known = {equation.id: equation for equation in equations()}
    rows = []
    for id, words in README.items():
        found = known[id]
        link = f"[{found.path.removeprefix('reifusion/')}:{found.mark}]({found.path}#L{found.mark})"
        rows.append(f"| {words} | {found.source} | {link} |\n")
    before, _, after = path.read_text(encoding="utf-8").partition(head)
    _, _, after = after.partition("\n\n")
    if not after:
        raise ValueError(f"{path.name} has no table of equations with text below it")
    text = f"{before}{head}{''.join(rows)}\n{after}"
    step = known["reverse-step"]  # the README's example of `make equation`
    text = re.sub(r"LINE=model/ddpm\.py:\d+", f"LINE=model/ddpm.py:{step.line}", text)
    write_text(path, text)


def main() -> int:
    from tests.equations.check import all_checks

    parser = argparse.ArgumentParser(description="The equations of the book, in the code and in the tests.")
    parser.add_argument("--readme", action="store_true", help="write the README's table anew as well")
    arguments = parser.parse_args()
    rows, missing, wrong, checks = equations(), 0, 0, all_checks()
    print(f"{'':5} {'equation':24} {'chapter':18} {'line':32} {'test':38} error")
    for equation in rows:
        check = checks.get(equation.id)
        error = None if check is None else check.error
        cells = (equation.number, equation.id, equation.chapter, equation.path and equation.place)
        test = equation.test_path and f"{Path(equation.test_path).name}:{equation.test_line}"
        good = check is None or error is None or error <= check.within
        print("{:5} {:24} {:18} {:32} {:38} {}{}".format(
            *(cell or "MISSING" for cell in (*cells, test)),
            "—" if error is None else f"{error:.1e}", "" if good else " WRONG"))  # fmt: skip
        missing += not (equation.chapter and equation.path and equation.test_path and check is not None)
        wrong += not good
    print(f"{len(rows)} equations, {missing} of them missing on one side, {wrong} wrong")
    if missing or wrong:
        return 1
    if arguments.readme:
        write_readme()
    return 0


if __name__ == "__main__":
    sys.exit(main())
