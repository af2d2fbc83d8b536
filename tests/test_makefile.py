"""`make up` on a machine that lacks something: one clear sentence, and nothing half-made is left."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _make_up(clone: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Also without what a `make test` around this test tells its children, or they would speak as "make[1]".
    ours = ("PIP_", "UV_", "SAFELIGHT_", "MAKE", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = ["make", "--no-print-directory", "up", *words]
    return subprocess.run(command, cwd=clone, env=kept | variables, capture_output=True, text=True, check=False)


def test_a_missing_python_is_one_sentence(clone: Path) -> None:
    ended = _make_up(clone, "PYTHON=")
    assert ended.returncode != 0
    sentence, *ours = ended.stderr.splitlines()
    assert sentence.startswith("Safelight needs Python 3.11 or later")
    assert all(line.startswith("make: ***") for line in ours)


def test_a_missing_wheel_is_named_in_one_sentence(clone: Path) -> None:
    ended = _make_up(clone, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("make: ***")]
    assert "No matching distribution found for uv==" in lines[-2]
    assert lines[-1].startswith("The dependencies could not be installed; the lines above name the package")
    assert not (clone / ".venv").exists()


def test_the_images_are_built_by_the_same_uv() -> None:
    version = re.search(r"^UV_VERSION = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert version
    assert f" uv=={version[1]}\n" in (ROOT / "Dockerfile").read_text()
