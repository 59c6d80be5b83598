"""`megatron-vapo settings` says what `config.py` says."""

from __future__ import annotations

import re

import pytest

from megatron_vapo.cli import main
from megatron_vapo.recipe.schema import SCHEMA


def test_every_setting_is_described_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    printed = capsys.readouterr().out
    named = re.findall(r"^([a-z][\w.]*)(?: =|:)", printed, re.MULTILINE)
    assert named == list(SCHEMA)
    words = " ".join(printed.split())
    assert all(" ".join(setting.doc.split()) in words for setting in SCHEMA.values())


@pytest.mark.parametrize(
    ("key", "lines"),
    [
        (
            "rollout.check_handover",
            [
                "rollout.check_handover = true",
                "    [true or false; acts where rollout.check_weights_every is above 0; may change when a run is",
            ],
        ),
        ("actor.virtual_pipeline", ["actor.virtual_pipeline = null", "    [int or null; at least 1; may change when"]),
        ("actor.recompute", ["actor.recompute = none", "    [none, selective or full; may change when a run"]),
        ("model", ["model: The base model.", "model.path = (to be chosen)", "    [text] Folder with config.json,"]),
    ],
)
def test_one_of_them(key: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", key]) == 0
    printed = capsys.readouterr().out.splitlines()
    for line, wanted in zip(printed, lines):
        assert line.startswith(wanted)


def test_a_misspelt_one_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "rollout.sglng"]) == 2
    assert "no setting or group is called rollout.sglng; rollout.sglang?" in capsys.readouterr().err
