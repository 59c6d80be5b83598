"""The picture of the rooms: it is drawn from the code's own imports, and there is no circle among them."""

from __future__ import annotations

import re
from graphlib import CycleError

import pytest

from tests.conftest import REPOSITORY
from tools import draw_architecture as tool


@pytest.fixture(scope="module")
def house():
    return tool.read_house()


def test_every_arrow_points_downwards(house):
    floors = house.floors
    for room, others in house.below.items():
        assert all(floors[other] < floors[room] for other in others), room


def test_it_sees_what_is_there(house):
    """Rooms by the file system, and two arrows that anyone can look up."""
    package = REPOSITORY / "megatron_vapo"
    folders = {path.name for path in package.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    files = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert set(house.below) == folders | files
    assert "training" in house.below["commands"]
    assert "config" in house.below["recipe"]
    assert "models" in house.megatron and "algorithm" not in house.megatron


def test_a_circle_is_found_and_named():
    circle = tool.House({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a")}, frozenset())
    with pytest.raises(CycleError) as caught:
        tool.describe(circle)
    assert set(caught.value.args[1]) == {"a", "b", "c"}


def test_arrows_that_follow_from_others_are_counted_but_not_drawn():
    house = tool.House({"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()}, frozenset())
    assert (house.arrows, house.floors) == (3, {"c": 0, "b": 1, "a": 2})
    assert house.drawn == {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset()}


def test_the_document_has_a_row_for_every_room(house):
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = {room for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for room in re.findall(r"`(\w+)`", cell)}
    assert set(house.below) <= rows


def test_it_draws(house, tmp_path):
    tool.draw(house, tmp_path / "rooms.png")
    assert (tmp_path / "rooms.png").read_bytes().startswith(b"\x89PNG")
