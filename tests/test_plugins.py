"""Signatures of functions that a recipe names, and the settings that they take."""

from __future__ import annotations

from typing import Literal

import pytest

from megatron_vapo.errors import RecipeError
from megatron_vapo.plugins import Plugin

HERE = __name__
READABLE = {"a": "the first", "b": "the second"}


def all_kinds(
    part,
    b,
    a,
    *,
    number: float,
    count: int = 3,
    flag: bool = False,
    level: Literal["token", "sequence"] = "token",
    bound: float | None = None,
    layers: list[int] = [1, 2],  # noqa: B006
    free=None,
): ...


def unknown_tensor(part, c): ...
def setting_without_star(part, a, clip=0.2): ...
def rest(part, *tensors): ...
def any_setting(part, **settings): ...
def nothing(): ...
def untyped(part, *, x: NoSuchType): ...  # noqa: F821


class Judge:
    def __call__(self, part, a, *, scale: float = 2.0): ...


judge = Judge()


def load(name: str) -> Plugin:
    return Plugin.load("loss", f"{HERE}:{name}", {}, READABLE)


def test_a_signature_says_what_is_read_and_what_is_set() -> None:
    plugin = load("all_kinds")
    assert plugin.reads == ("b", "a") and plugin.function.__name__ == "all_kinds"
    defaults = {"count": 3, "flag": False, "level": "token", "bound": None, "layers": [1, 2], "free": None}
    assert plugin.chosen({"number": 1}) == {"number": 1.0} | defaults
    given = {"number": "1e-3", "count": "4", "flag": True, "level": "sequence", "bound": 2, "layers": [5], "free": "x"}
    chosen = plugin.chosen(given | {"of_another": 1})
    assert chosen == given | {"number": 1e-3, "count": 4, "bound": 2.0}
    assert type(chosen["bound"]) is float and type(chosen["layers"]) is list


def test_a_callable_object_is_read_as_its_call() -> None:
    plugin = load("judge")
    assert plugin.reads == ("a",) and plugin.chosen({}) == {"scale": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set algorithm.options.number"),
        ({"number": "much"}, "algorithm.options.number: Value 'much'"),
        ({"number": None}, "algorithm.options.number"),
        ({"number": 1, "count": 1.5}, "algorithm.options.count"),
        ({"number": 1, "level": "turn"}, "algorithm.options.level"),
        ({"number": 1, "layers": ["x"]}, "algorithm.options.layers"),
    ],
)
def test_a_setting_of_another_kind_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load("all_kinds").chosen(options)
    text = str(caught.value)
    assert message in text and f"loss '{HERE}:all_kinds'" in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown_tensor", "no tensor is called c, there are a, b"),
        ("setting_without_star", "no tensor is called clip, there are a, b; a setting stands after *"),
        ("rest", r"takes \*tensors"),
        ("any_setting", r"takes \*\*settings"),
        ("nothing", "signature cannot be read"),
        ("untyped", "NoSuchType"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_signature_of_another_kind_is_refused(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(name)
