"""Pictures that nobody made for these tests: those of the installed packages and of the system, each judged."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from conftest import need_judges

JUDGE = Path(__file__).parent / "judge.py"
IMAGE = re.compile(r"\.(jpe?g|png|gif|webp|tiff?|bmp|avif)$", re.IGNORECASE)
MAX_BYTES, MOST = 500_000, 120  # of a file, and files of a folder: half a minute in all


def pictures(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if IMAGE.search(path.name) and path.is_file()]
    small = [path for path in found if 0 < path.stat().st_size < MAX_BYTES]
    return small[:: max(1, len(small) // MOST)]


def test_every_picture_on_this_machine_is_mirrored_right(tmp_path: Path) -> None:
    need_judges()
    folders = {Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib", "stdlib")} | {Path("/usr/share")}
    for number, path in enumerate(path for folder in folders for path in pictures(folder)):
        (tmp_path / f"{number}-{path.name}").symlink_to(path)
    (tmp_path / "test_image.jpg").symlink_to(Path(__file__).parents[1] / "test_image.jpg")
    done = subprocess.run([sys.executable, JUDGE, tmp_path], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^JPEG +[1-9]", done.stdout, re.MULTILINE), done.stdout
