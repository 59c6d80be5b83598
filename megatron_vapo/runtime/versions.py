"""Which Megatron Core this project runs on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from megatron_vapo.errors import InstallationError

MEGATRON_VERSIONS = ("0.16.1", "0.19.2")
"""On Python 3.11, and on Python 3.12. Releases change parts that have no public names and that this project uses
(process groups, the checkpoint writer, on CPU also the optimizer): see models/megatron_versions.py."""


def check_megatron() -> None:
    """Refuse an unknown Megatron Core, which might write checkpoints or take gradients otherwise than it should.

    Raises:
        InstallationError: not installed, or another version than `MEGATRON_VERSIONS`.
    """
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise InstallationError(f"megatron-core is not installed: {_advice()}") from None
    if found not in MEGATRON_VERSIONS:
        raise InstallationError(f"megatron-core {found} is not one of {', '.join(MEGATRON_VERSIONS)}: {_advice()}")


def _advice() -> str:
    return "install the version that this project pins (pip install --editable . in its repository; docs/install.md)"
