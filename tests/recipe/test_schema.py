"""Every setting's facts stand in config.py, once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, get_args, get_origin

import pytest

from megatron_vapo import config
from megatron_vapo.recipe.schema import SCHEMA, Setting, value_of

UNBOUNDED = {"value_pretraining.target_explained_variance", "critic.head.low", "critic.head.high"}
"""Numbers that may have any finite value: explained variance falls without end, returns are in units of reward."""

LEAVES = [setting for setting in SCHEMA.values() if not setting.is_group]


def is_number(setting: Setting) -> bool:
    if get_origin(setting.type) is dict:
        return False
    return bool({int, float} & {setting.type, *get_args(setting.type)})


def named(key: Any) -> str:
    return key.key if isinstance(key, Setting) else str(key)


@pytest.mark.parametrize("setting", SCHEMA.values(), ids=named)
def test_every_setting_is_documented(setting: Setting) -> None:
    assert len(setting.doc.split()) >= 2 and setting.doc.rstrip()[-1] in ".)"
    assert "  " not in setting.doc


@pytest.mark.parametrize("setting", LEAVES, ids=named)
def test_null_is_explained_where_it_is_allowed(setting: Setting) -> None:
    if type(None) in get_args(setting.type):
        assert "null" in setting.doc


@pytest.mark.parametrize("setting", LEAVES, ids=named)
def test_numbers_have_bounds_which_their_defaults_keep(setting: Setting) -> None:
    assert (setting.bounds is not None) == (is_number(setting) and setting.key not in UNBOUNDED)
    default = value_of(config.Recipe(), setting.key)
    assert setting.bounds is None or default is None or setting.bounds.holds(default)


def test_recipes_cannot_be_changed() -> None:
    recipe = config.Recipe()
    groups = [recipe, *(value_of(recipe, setting.key) for setting in SCHEMA.values() if setting.is_group)]
    assert len(groups) > 15
    for group in groups:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, None)


def test_settings_need_nothing_but_python() -> None:
    code = (
        "import sys; from megatron_vapo.config import AlgorithmConfig; AlgorithmConfig(); "
        "print(sorted({'omegaconf', 'yaml', 'torch', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
