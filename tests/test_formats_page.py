"""The page about formats: every row names a test, and every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_row_is_backed_by_tests_that_exist() -> None:
    there = {
        name
        for path in (ROOT / "tests" / "operations").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    lines = (ROOT / "docs" / "formats.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| property")]
    assert len(rows) > 60
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        assert not set(named) - there, row
