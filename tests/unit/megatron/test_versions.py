"""A version of megatron-core that was never tried is refused in one line, before anything of it is imported."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modellink_lora.config.errors import UserError
from modellink_lora.device import redirect
from modellink_lora.megatron import versions


@pytest.fixture(autouse=True)
def looked_up_anew() -> Iterator[None]:
    versions.installed.cache_clear()
    yield
    versions.installed.cache_clear()


def install(version: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a source tree of that release before the real one."""
    major, minor, patch = version.split(".")
    core = site / "megatron/core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise AssertionError('imported')")
    (core / "package_info.py").write_text(f"# x\n\nMAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)


def test_the_version_is_that_of_the_package_which_is_imported() -> None:
    assert versions.installed() == importlib.metadata.version("megatron-core")


@pytest.mark.parametrize("version", ["0.14.0", "0.15.3", "0.16.1", "0.19.2"])
def test_any_release_of_a_minor_version_that_was_tried_is_taken(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(version, tmp_path, monkeypatch)
    versions.check_version()


@pytest.mark.parametrize("version", ["0.13.1", "0.20.0", "1.15.0"])
def test_another_version_is_refused_with_the_command_that_helps(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(version, tmp_path, monkeypatch)
    with pytest.raises(UserError) as refused:
        redirect.install(redirect.CPU)
    assert str(refused.value) == (
        f"megatron-core {version} was not tried with this package; tried are {', '.join(versions.TRIED)}: "
        "pip install 'megatron-core>=0.14,<0.20'"
    )


def test_versions_are_compared_as_numbers() -> None:
    assert versions.release("0.9.1") < versions.release("0.16.1") == (0, 16)


def test_a_name_that_has_to_be_replaced_and_is_not_there_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.tensor_parallel.random as random

    monkeypatch.delattr(random, "_set_cuda_rng_state")
    with pytest.raises(UserError, match="has no _set_cuda_rng_state, which has to be replaced for cpu"):
        redirect.install(redirect.CPU)
