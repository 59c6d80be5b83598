"""Draw the rooms of the package and the imports between them, as they are in the code, and count them.

    python tools/draw_architecture.py --write docs/architecture.png

A room is a folder or a module at the top of `megatron_vapo`. Its floor is the length of the longest chain of imports
below it, so every arrow points downwards, unless rooms import each other in a circle: then nothing is drawn, the circle
is printed, and the exit code is 1. The picture leaves out arrows that follow from others (a to c, where a to b to c).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate, pairwise
from pathlib import Path

import grimp

PACKAGE = "megatron_vapo"
FOLDER = Path(__file__).resolve().parents[1] / PACKAGE


@dataclass(frozen=True)
class House:
    """The rooms, and for each the rooms that it imports."""

    below: dict[str, frozenset[str]]
    megatron: frozenset[str]
    """Rooms in which a file imports Megatron Core itself."""

    @property
    def arrows(self) -> int:
        return sum(len(rooms) for rooms in self.below.values())

    @property
    def floors(self) -> dict[str, int]:
        """Room -> the longest chain of imports below it.

        Raises:
            graphlib.CycleError: rooms import each other in a circle; its second argument names them.
        """
        floors: dict[str, int] = {}
        for room in TopologicalSorter(self.below).static_order():
            floors[room] = max((floors[other] + 1 for other in self.below[room]), default=0)
        return floors

    @property
    def drawn(self) -> dict[str, frozenset[str]]:
        """The arrows that do not follow from others."""
        reached: dict[str, frozenset[str]] = {}
        for room in TopologicalSorter(self.below).static_order():
            reached[room] = self.below[room].union(*(reached[other] for other in self.below[room]))
        return {
            room: others - frozenset().union(*(reached[other] for other in others))
            for room, others in self.below.items()
        }


def read_house() -> House:
    """Read the imports of every file, those inside functions and for type checkers included."""
    graph = grimp.build_graph(PACKAGE, include_external_packages=True, cache_dir=None)
    files = [module for module in graph.modules if module.startswith(PACKAGE)]
    below: dict[str, set[str]] = {_room(module): set() for module in files if module != PACKAGE}
    megatron = set()
    for module in files:
        imported = graph.find_modules_directly_imported_by(module)
        if module == PACKAGE:
            continue
        below[_room(module)] |= {_room(other) for other in imported if other.startswith(f"{PACKAGE}.")}
        if "megatron" in imported:
            megatron.add(_room(module))
    return House({room: frozenset(others - {room}) for room, others in below.items()}, frozenset(megatron))


def _room(module: str) -> str:
    return module.split(".")[1]


def describe(house: House) -> str:
    """The counts in one line.

    Raises:
        graphlib.CycleError: as `House.floors`.
    """
    floors = max(house.floors.values()) + 1
    return f"{len(house.below)} rooms, {house.arrows} arrows, {floors} floors, no circle"


def draw(house: House, path: Path) -> None:
    """Draw the rooms by floor, the lowest at the bottom, with the arrows that do not follow from others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = _ways(house)
    places = _places(ways)
    figure, axes = plt.subplots(figsize=(11, 1.1 * (max(house.floors.values()) + 1)))
    for way in ways:
        _arrow(axes, [places[stop] for stop in way])
    for room, floor in house.floors.items():
        _box(axes, *places[room, "", floor], room, _size(room), "#cfe3f7" if room in house.megatron else "#f4f1e8")
    axes.autoscale_view()
    axes.axis("off")
    axes.set_title(f"{describe(house)}; blue: imports Megatron Core itself", fontsize=10, color="#444444")
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None} if path.suffix == ".png" else None)
    plt.close(figure)


Stop = tuple[str, str, int]
"""(room, "", its floor), or (from, to, floor): where an arrow passes a floor on its way from one room to another."""


def _ways(house: House) -> list[list[Stop]]:
    """The stops of each arrow that is drawn, from the upper room to the lower, one on every floor."""
    floors = house.floors
    return [
        [
            (room, "", floors[room]),
            *((room, other, floor) for floor in range(floors[room] - 1, floors[other], -1)),
            (other, "", floors[other]),
        ]
        for room, others in sorted(house.drawn.items())
        for other in sorted(others)
    ]


def _places(ways: list[list[Stop]]) -> dict[Stop, tuple[float, float]]:
    """Stop -> where it is drawn: near what it is joined to, in an order in which few arrows cross."""
    joined: dict[Stop, list[Stop]] = {}
    for way in ways:
        for upper, lower in pairwise(way):
            joined.setdefault(upper, []).append(lower)
            joined.setdefault(lower, []).append(upper)
    x = {stop: float(i) for i, stop in enumerate(sorted(joined))}
    floors = sorted({stop[2] for stop in joined})
    for sweep in range(60):
        direction = -1 if sweep % 2 == 0 else 1
        for floor in floors[::-direction]:
            row = [stop for stop in joined if stop[2] == floor]
            near = {s: [x[n] for n in joined[s] if (n[2] - floor) * direction > 0 or sweep > 40] or [x[s]] for s in row}
            row.sort(key=lambda stop: (sum(near[stop]) / len(near[stop]), stop))
            x.update(zip(row, _apart([sum(near[stop]) / len(near[stop]) for stop in row], row)))
    return {stop: (x[stop], float(stop[2])) for stop in joined}


def _apart(wanted: list[float], row: list[Stop]) -> list[float]:
    """The nearest numbers, by squares, to ascending ones that leave room for boxes and passing arrows side by side."""
    half = [0.35 if stop[1] else 1.05 for stop in row]
    at = list(accumulate((left + right for left, right in pairwise(half)), initial=0.0))
    blocks: list[tuple[float, int]] = []  # mean and count: neighbours that would overlap move as one
    for mean, count in zip((want - offset for want, offset in zip(wanted, at)), [1] * len(row)):
        while blocks and blocks[-1][0] > mean:
            other, size = blocks.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        blocks.append((mean, count))
    return [mean + offset for mean, offset in zip((m for m, count in blocks for _ in range(count)), at)]


def _arrow(axes, points: list[tuple[float, float]]) -> None:
    """An arrow that is vertical at each point."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    (x, y), *others = points
    vertices, codes = [(x, y - 0.24)], [Curve.MOVETO]
    for i, (to_x, to_y) in enumerate(others):
        to_y += 0.25 if i == len(others) - 1 else 0
        from_x, from_y = vertices[-1]
        middle = (from_y + to_y) / 2
        vertices += [(from_x, middle), (to_x, middle), (to_x, to_y)]
        codes += [Curve.CURVE4] * 3
    axes.add_patch(PathPatch(Curve(vertices, codes), edgecolor="#8a8a8a", linewidth=0.9, fill=False))
    axes.plot(*vertices[-1], marker="v", markersize=5, color="#8a8a8a")


def _box(axes, x: float, y: float, title: str, subtitle: str, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = {"boxstyle": "round,pad=0.04", "facecolor": colour, "edgecolor": "#555555", "zorder": 3}
    axes.add_patch(FancyBboxPatch((x - 0.8, y - 0.2), 1.6, 0.4, **style))
    axes.text(x, y + 0.06, title, ha="center", va="center", fontsize=10, weight="bold", zorder=4)
    axes.text(x, y - 0.12, subtitle, ha="center", va="center", fontsize=7, color="#555555", zorder=4)


def _size(room: str) -> str:
    files = list((FOLDER / room).rglob("*.py")) or [FOLDER / f"{room}.py"]
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in files)
    written = [path for path in files if path.stat().st_size]
    return f"{len(written)} file{'s' if len(written) != 1 else ''}, {lines:,} lines"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="picture to write (.png, .pdf, .svg)")
    options = parser.parse_args()
    house = read_house()
    try:
        floors = house.floors
    except CycleError as error:
        print(f"circle: {' imports '.join(reversed(error.args[1]))}", file=sys.stderr)
        return 1
    for floor in sorted(set(floors.values()), reverse=True):
        print(f"{floor:2d}  {', '.join(sorted(room for room in floors if floors[room] == floor))}")
    print(describe(house))
    if options.write:
        draw(house, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
