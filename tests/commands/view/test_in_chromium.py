"""The page in a real browser: what it shows, keyboard and screen reader, 20,000 tokens, both themes.

`bash tests/commands/view/install.sh` installs the browser.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vapo.commands.view import view
from tests.commands.view.chromium import Chromium
from tests.commands.view.conftest import LONG, ViewedRun

pytestmark = pytest.mark.slow

NODES = 2500
"""Elements in the document at most, whatever is shown: a page of 20,000 elements is no longer fluid."""


@pytest.fixture(scope="module")
def browser(viewed_run: ViewedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no chromium: bash tests/commands/view/install.sh")
    folder = tmp_path_factory.mktemp("browser")
    chromium = Chromium(executable, folder / "profile")
    chromium.open(view(viewed_run.folder, None, folder / "page.html"))
    yield chromium
    chromium.close()


def text(browser: Chromium, selector: str) -> str:
    return browser.run(f"document.querySelector({selector!r}).innerText")


def facts(browser: Chromium, pane: int = 0) -> dict[str, str]:
    """The numbers that a pane shows of a token, by name."""
    return browser.run(
        f"Object.fromEntries([...document.querySelectorAll('.pane')[{pane}].querySelectorAll('.facts div')]"
        ".map(row => [row.children[0].textContent, row.children[1].textContent]))"
    )


def listed(browser: Chromium) -> list[list[str]]:
    """The rows in sight of the list of responses."""
    return browser.run(
        "[...document.querySelectorAll('#list .row')].sort((a, b) => a.offsetTop - b.offsetTop)"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )


def test_a_right_beside_a_wrong_response_of_one_group(browser: Chromium) -> None:
    titles = browser.run("[...document.querySelectorAll('.pane h3')].map(title => title.textContent)")
    assert "✓ right" in titles[0] and "✗ wrong" in titles[1] and all("step 2" in title for title in titles)
    groups = browser.run(
        "[...document.querySelectorAll('.pane')].map(pane => [...pane.querySelectorAll('.group button')]"
        ".map(button => button.textContent))"
    )
    assert groups[0] == groups[1] and len(groups[0]) == 4
    assert "flat_values since train step 2. Likely causes" in text(browser, "#alarm-list")


def test_the_selected_token_has_the_runs_numbers(browser: Chromium, viewed_run: ViewedRun) -> None:
    batch = viewed_run.batches[2]
    browser.choose("#sort", "order")
    browser.click("#list .row")  # the first response, of 20,000 tokens
    browser.run("document.querySelector('.pane .tokens').focus()")
    for key, token in (("Home", 0), ("ArrowRight", 1), ("End", LONG - 1), ("ArrowLeft", LONG - 2)):
        browser.press(key)
        shown = facts(browser)
        assert f"token {token + 1} of {LONG}" in shown
        for name, tensor in (("value", batch.values), ("advantage", batch.advantages), ("entropy", batch.entropy)):
            assert float(shown[name]) == pytest.approx(float(tensor[token]), abs=1e-4)
        difference = float(batch.logprobs[token] - batch.rollout_logprobs[token])
        assert float(shown["actor - engine"]) == pytest.approx(difference, abs=1e-4)


def test_the_key_d_goes_to_the_largest_drop(browser: Chromium, viewed_run: ViewedRun) -> None:
    values = viewed_run.batches[2].values[:LONG]
    browser.press("Home")  # a token that is a drop itself changes nothing
    browser.press("d")
    falls = values[1:] - values[:-1]
    shown = facts(browser)
    assert f"token {int(falls.argmin()) + 1} of {LONG}" in shown  # the one after which the value is lower
    assert float(shown["change of value"]) == pytest.approx(float(falls.min()), abs=1e-4)
    second, third = falls.argsort()[1:3].tolist()
    browser.press("d", 2)
    assert f"token {third + 1} of {LONG}" in facts(browser)
    browser.press("D")
    assert f"token {second + 1} of {LONG}" in facts(browser)


def test_few_elements_stand_for_20000_tokens(browser: Chromium) -> None:
    """What is in the document is what is in sight, at the start, in the middle and at the end of the response."""
    for key in ("Home", "PageDown", "End"):
        browser.press(key)
        assert 500 < browser.run("document.querySelectorAll('*').length") < NODES
    rows = browser.run("document.querySelector('.pane .tokens').scrollHeight / 22")
    assert rows > 500
    browser.run("document.querySelector('.pane .tokens').scrollTop = 4000")
    browser.draw()
    assert browser.run("document.querySelectorAll('*').length") < NODES
    tops = browser.run("[...document.querySelectorAll('.pane')[0].querySelectorAll('.line')].map(l => l.offsetTop)")
    assert min(tops) <= 4000 and max(tops) >= 4000 + 200


def test_the_list_filters_and_sorts(browser: Chromium) -> None:
    browser.choose("#outcome", "wrong")
    assert all("✗" in row[1] for row in listed(browser)) and "8 of 32 kept" in text(browser, "#count")
    browser.choose("#outcome", "")
    browser.choose("#sort", "length")
    lengths = [int(row[2]) for row in listed(browser)]
    assert lengths == sorted(lengths) and len(lengths) == 16
    browser.click("#descending")
    assert int(listed(browser)[0][2]) == LONG
    browser.choose("#sort", "drop")
    drops = [float(row[3]) for row in listed(browser)]
    assert drops == sorted(drops, reverse=True)
    browser.choose("#length", 20)
    assert all(int(row[2]) >= 20 for row in listed(browser)) and len(listed(browser)) == 4
    browser.choose("#length", 0)
    browser.choose("#text", "owned")
    assert 0 < len(listed(browser)) <= 16
    browser.choose("#text", "no model writes this")
    assert listed(browser) == [] and "0 of" in text(browser, "#count")
    browser.choose("#text", "")
    browser.choose("#step", "")
    assert "32 of 32 kept" in text(browser, "#count")


def test_the_list_by_keyboard(browser: Chromium) -> None:
    browser.choose("#sort", "order")
    browser.run("document.querySelector('#descending').checked && document.querySelector('#descending').click()")
    browser.run("document.querySelector('#list').focus()")
    browser.press("Home")
    browser.press("ArrowDown", 2)
    assert browser.run("document.querySelector('#list').getAttribute('aria-activedescendant')") == "row-2"
    assert "9 tokens" in text(browser, ".pane.active h3")  # step 1 has 90, 8, 9, ... tokens


def test_first_beside_last_step(browser: Chromium) -> None:
    browser.click("#first-last")
    titles = browser.run("[...document.querySelectorAll('.pane h3')].map(title => title.textContent)")
    assert "step 1 ·" in titles[0] and "step 2 ·" in titles[1]
    browser.click("#two")
    assert browser.run("document.querySelectorAll('.pane')[1].offsetParent") is None
    browser.click("#two")


def test_what_the_policy_only_read_has_no_numbers(browser: Chromium, viewed_run: ViewedRun) -> None:
    """In step 1 that is every fifth token. The value before it changes to the next that there is."""
    batch = viewed_run.batches[1]
    browser.choose("#sort", "order")
    browser.run("document.querySelector('#list').focus()")
    browser.press("Home")
    read = browser.run(
        "[...document.querySelectorAll('.pane.active .token.read')]"
        ".map(token => [+token.dataset.token, token.style.backgroundColor])"
    )
    assert read and all(token % 5 == 2 and colour == "" for token, colour in read)
    pane = browser.run("[...document.querySelectorAll('.pane')].findIndex(pane => pane.classList.contains('active'))")
    browser.run("document.querySelector('.pane.active .tokens').focus()")
    browser.press("Home")
    browser.press("ArrowRight", 2)
    shown = facts(browser, pane)
    assert shown["written by"].startswith("others") and shown["value"] == shown["clipped in update"] == "-"
    browser.press("ArrowLeft")
    shown = facts(browser, pane)
    assert shown["written by"] == "the policy"
    change = float(batch.values[3] - batch.values[1])
    assert float(shown["change of value"]) == pytest.approx(change, abs=1e-4)
    strips = browser.run("document.querySelector('.pane.active .strip').getAttribute('aria-label')")
    assert strips.startswith("Value from") and "NaN" not in strips


def test_colours_follow_the_choice(browser: Chromium, viewed_run: ViewedRun) -> None:
    """Positive and negative numbers have different hues, larger ones more of it; what was clipped is marked as well."""
    browser.click("#right-wrong")
    seen = {}
    for key in (
        "value",
        "change",
        "advantage",
        "return",
        "logprob",
        "rollout_logprob",
        "difference",
        "entropy",
        "ratio",
    ):
        browser.choose("#colour", key)
        seen[key] = browser.run(
            "[...document.querySelectorAll('.token')].map(token => getComputedStyle(token).backgroundColor)"
        )
        assert len(set(seen[key])) > 3, key
    assert len({tuple(colours) for colours in seen.values()}) == len(seen)
    browser.choose("#colour", "clipped")
    marked = browser.run(
        "[...document.querySelectorAll('.token')].map(token => "
        "[token.classList.contains('clipped'), token.style.backgroundColor !== ''])"
    )
    assert {tuple(pair) for pair in marked} == {(True, True), (False, False)}
    browser.choose("#colour", "value")


def test_what_a_screen_reader_meets(browser: Chromium) -> None:
    browser.run("document.querySelector('.pane .tokens').focus()")
    browser.press("Home")
    tree = browser.tree()
    roles = [role for role, _ in tree]
    assert roles.count("listbox") == 3 and "status" in roles and roles.count("heading") >= 5
    names = [name for role, name in tree if role == "image"]
    assert len(names) == 5 and all(names)  # three charts, two strips
    assert any("largest drop" in name for name in names)
    options = [name for role, name in tree if role == "option"]
    assert any(", value " in name for name in options)
    controls = [name for role, name in tree if role in ("combobox", "button", "checkbox", "spinbutton", "searchbox")]
    assert controls and all(controls)
    active = browser.run("document.activeElement.getAttribute('aria-activedescendant')")
    assert browser.run(f"document.getElementById({active!r}).getAttribute('aria-posinset')") == "1"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read(browser: Chromium, tmp_path: Path, theme: str) -> None:
    """By the system's wish and by the page's own choice; text on the strongest colours keeps a contrast of 4.5."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser("Emulation.setEmulatedMedia", features=features)
    by_system = browser.run("getComputedStyle(document.body).backgroundColor")
    browser("Emulation.setEmulatedMedia", features=[])
    browser.choose("#theme", theme)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == by_system
    assert (by_system == "rgb(255, 255, 255)") == (theme == "light")
    ink, surface = (rgb(browser, f"var(--{name})") for name in ("ink", "raised"))
    for name in ("positive", "negative", "third"):
        strongest = [0.5 * c + 0.5 * s for c, s in zip(rgb(browser, f"var(--{name})"), surface)]
        assert contrast(ink, strongest) >= 4.5, name
    for name in ("ink", "faint"):
        assert contrast(rgb(browser, f"var(--{name})"), surface) >= 4.5, name
    browser.picture(tmp_path / f"{theme}.png")
    assert (tmp_path / f"{theme}.png").stat().st_size > 50_000
    browser.choose("#theme", "")


def rgb(browser: Chromium, colour: str) -> list[float]:
    script = f"document.body.style.outlineColor = '{colour}', getComputedStyle(document.body).outlineColor"
    found = browser.run(script)
    return [float(part) for part in found.partition("(")[2].rstrip(")").split(",")[:3]]


def contrast(one: list[float], other: list[float]) -> float:
    """The ratio of relative luminances, as WCAG 2 defines it."""

    def luminance(colour: list[float]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_nothing_that_was_written_ran_and_nothing_was_asked_for(browser: Chromium) -> None:
    """The last test: after all of the above, hostile text was shown in every place."""
    assert browser.run("document.title") == "viewed </title>: tokens"
    assert browser.run("document.images.length") == 0
    assert browser.problems == []
    assert all(address.startswith(("file:", "about:")) for address in browser.asked) and browser.asked
