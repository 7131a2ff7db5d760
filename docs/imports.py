"""Which part imports which: read from the code, and drawn."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "reifusion"
WIDTH, BOX, ROW = 640, (112, 44), 96


def parts() -> dict[str, list[Path]]:
    """Returns the parts of the package, in the order of their names, with their files."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if not first.startswith("__"):
            found[first].append(path)
    return dict(found)


def imports() -> dict[tuple[str, str], bool]:
    """(who, whom) -> True if the import of who needs whom; False if only some functions of who do."""
    known = parts()
    found: dict[tuple[str, str], bool] = {}
    for name, files in known.items():
        for path in files:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            late = {child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.If)
                    for child in ast.walk(node)}  # fmt: skip
            for node in ast.walk(tree):
                for whom in _targets(node, path):
                    if whom in known and whom != name:
                        found[name, whom] = found.get((name, whom), False) or node not in late
    return found


def _targets(node: ast.AST, path: Path) -> list[str]:
    """Returns the parts that an import names."""
    if isinstance(node, ast.Import):
        modules = [alias.name.split(".") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = ("reifusion", *path.relative_to(PACKAGE).parts[:-1])
        stem = list(package[: len(package) - node.level + 1]) if node.level else []
        base = stem + (node.module.split(".") if node.module else [])
        modules = [[*base, alias.name] for alias in node.names]
    else:
        return []
    return [module[1] for module in modules if module[0] == "reifusion" and len(module) > 1]


def levels(edges: dict[tuple[str, str], bool]) -> dict[str, int]:
    """How high each part stands: above the parts that it needs; if it needs none, close below its users.

    Raises ValueError if two parts need each other.
    """
    needs: dict[str, set[str]] = {name: set() for name in parts()}
    for who, whom in edges:
        needs[who].add(whom)

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"{' imports '.join((*above, name))}: a circle")
        return 1 + max((height(other, (*above, name)) for other in needs[name]), default=-1)

    heights = {name: height(name) for name in needs}
    for name in needs:
        if not needs[name]:
            heights[name] = min((heights[who] for who, whom in edges if whom == name), default=1) - 1
    return heights


def direct(edges: dict[tuple[str, str], bool]) -> dict[tuple[str, str], bool]:
    """The edges without those that others imply: from a to c, if a → b → c."""

    def reaches(start: str, goal: str, seen: frozenset[str]) -> bool:
        return any(
            whom == goal or reaches(whom, goal, seen | {whom})
            for who, whom in edges if who == start and whom not in seen
        )  # fmt: skip

    return {
        (who, whom): at_once
        for (who, whom), at_once in edges.items()
        if not any(
            reaches(other, whom, frozenset((who, other)))
            for one, other in edges
            if one == who and other != whom
        )
    }


def _middle(places: Iterable[float]) -> float:
    """The mean of places; without any, the middle of the page."""
    found = list(places)
    return sum(found) / len(found) if found else WIDTH / 2


Place = tuple[float, float]


def _around(place: dict[str, Place], start: Place, end: Place) -> list[Place]:
    """Returns where a line between two boxes has to bend, so that it passes beside those that lie between."""
    low, high = sorted((start[1], end[1]))
    between = [(x, y) for x, y in place.values() if low < y < high]
    ways, down = [start, end], 1 if end[1] > start[1] else -1
    while hit := next(
        ((k, box) for k, line in enumerate(pairwise(ways)) for box in between if _hits(*line, box)), None
    ):
        k, (_, row) = hit
        (x1, y1), (x2, y2) = ways[k], ways[k + 1]
        straight = x1 + (x2 - x1) * (row - y1) / (y2 - y1)
        boxes = sorted(x for x, y in between if y == row)
        sides = [boxes[0] - BOX[0] - 8, *boxes, boxes[-1] + BOX[0] + 8]
        gaps = [gap for a, b in pairwise(sides) if 0 < (gap := (a + b) / 2) < WIDTH]
        x, reach = min(gaps, key=lambda gap: abs(gap - straight)), down * (BOX[1] / 2 + 6)
        ways[k + 1 : k + 1] = [(x, row - reach), (x, row + reach)]
    return ways[1:-1]


def _hits(a: Place, b: Place, box: Place) -> bool:
    """True if the line from a to b, which is not level, passes behind a box."""
    (x1, y1), (x2, y2), (x, y) = a, b, box
    rows = (max(min(y1, y2), y - BOX[1] / 2), min(max(y1, y2), y + BOX[1] / 2))
    if rows[0] >= rows[1]:
        return False
    left, right = sorted(x1 + (x2 - x1) * (row - y1) / (y2 - y1) for row in rows)
    return left < x + BOX[0] / 2 + 2 and right > x - BOX[0] / 2 - 2


def diagram() -> str:
    """Returns an SVG with a box for each part and a line to each part it needs; dashed: only in functions."""
    edges = imports()
    drawn, heights = direct(edges), levels(edges)
    top = max(heights.values())
    place: dict[str, tuple[float, float]] = {}
    for level in range(top + 1):
        names = [name for name in heights if heights[name] == level]
        names.sort(key=lambda name: _middle(place[whom][0] for who, whom in drawn if who == name))
        for k, name in enumerate(names):
            below = [place[whom][0] for who, whom in drawn if who == name and heights.get(whom) == level - 1]
            alone = len(names) == 1 and below  # stands above what it needs
            x = sum(below) / len(below) if alone else (2 * k + 1) * WIDTH / (2 * len(names))
            place[name] = (x, (top - level) * ROW + BOX[1] / 2 + 4)
    lines = []
    for (who, whom), at_once in sorted(drawn.items()):
        (x1, y1), (x2, y2) = place[who], place[whom]
        down = 1 if y2 > y1 else -1
        dash = "" if at_once else ' stroke-dasharray="4 4"'
        start, end = y1 + down * BOX[1] / 2, y2 - down * BOX[1] / 2
        way = "".join(f" L{x:.0f} {y:.0f}" for x, y in _around(place, (x1, start), (x2, end)))
        lines.append(
            f'<path d="M{x1:.0f} {start:.0f}{way} L{x2:.0f} {end:.0f}" stroke="currentColor" fill="none"'
            f' marker-end="url(#arrow)"{dash}/>'
        )
    boxes = [
        f'<rect x="{x - BOX[0] / 2:.0f}" y="{y - BOX[1] / 2:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6"'
        f' fill="var(--paper, white)" stroke="currentColor"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" fill="currentColor">{name}</text>'
        for name, (x, y) in place.items()
    ]
    needs = {name: sorted(whom for who, whom in edges if who == name) for name in place}
    said = "; ".join(f"{name} imports {', '.join(needs[name]) or 'none of the others'}" for name in place)
    size = f"0 0 {WIDTH} {top * ROW + BOX[1] + 8}"
    return (
        f'<svg class="diagram" role="img" aria-label="{said}" viewBox="{size}">'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"'
        ' orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="currentColor"/></marker></defs>'
        f"{''.join(lines + boxes)}</svg>"
    )


def table() -> str:
    """Returns each part with its files, lines and imports as HTML; the part that needs most comes first."""
    edges, heights = imports(), levels(imports())
    rows = []
    for name, files in sorted(parts().items(), key=lambda item: -heights[item[0]]):
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        at_once = [whom for (who, whom), now in sorted(edges.items()) if who == name and now]
        late = [whom for (who, whom), now in sorted(edges.items()) if who == name and not now]
        cells = (name, len(files), f"{lines:,}", ", ".join(at_once) or "—", ", ".join(late) or "—")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in ("part", "files", "lines", "imports", "… when it is used"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
