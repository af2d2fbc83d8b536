"""A user's own operations, as the examples and `docs/operations.md` have them: installed, and by `--import`."""

from __future__ import annotations

import importlib
import io
import json
import operator
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT, System, start_system
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

PACKAGE = ROOT / "examples" / "grayscale"
GUIDE = ROOT / "docs" / "operations.md"
UV = Path(sys.executable).with_name("uv")


def from_guide(name: str) -> str:
    """The Python block of the guide whose first line names its file."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith(f"# {name}\n"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A system with all of them: one installed for its workers alone, the others as files in its folder."""
    folder = tmp_path_factory.mktemp("examples")
    source, target = folder / "source", folder / "installed"
    shutil.copytree(PACKAGE, source)
    pip = [str(UV), "pip"] if UV.exists() else [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(target), str(source)], check=True)
    shutil.copy(ROOT / "examples" / "invert.py", folder)
    (folder / "darkroom.py").write_text(from_guide("darkroom.py"))
    options = ("--workers", "1", "--import", "invert", "--import", "darkroom")
    system = start_system(folder, *options, PYTHONPATH=str(target))
    yield system
    assert system.stop() == 0


@pytest.fixture
def picture() -> Image.Image:
    """Of 16 x 12 colours, each pixel another one."""
    picture = Image.new("RGB", (16, 12))
    picture.putdata([(x * 16, y * 20, (x * y) % 256) for y in range(12) for x in range(16)])
    return picture


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def saved(system: System, answer: httpx.Response) -> Image.Image:
    """The image that an answer links to."""
    return Image.open(io.BytesIO(system.client.get(answer.links["related"]["url"]).content))


def test_an_installed_operation_returns_an_image_and_a_note(system: System, picture: Image.Image) -> None:
    answer = system.post(encoded(picture), "?operations=grayscale")
    assert answer.text == '{"status": "SUCCESS"}'
    assert answer.headers["safelight-grayscale"] == "converted"
    grey = saved(system, answer)
    assert (grey.format, grey.mode) == ("PNG", "L")
    assert grey.tobytes() == picture.convert("L").tobytes()


def test_operations_run_in_order_each_on_what_the_one_before_left(system: System, picture: Image.Image) -> None:
    answer = system.post(encoded(picture), "?operations=invert,grayscale,mirror,dimensions")
    assert answer.json() == {"status": "SUCCESS", "width": 16, "height": 12}
    assert answer.headers["safelight-mirror"] == "lossless"
    expected = ImageOps.mirror(ImageOps.invert(picture).convert("L"))
    assert saved(system, answer).tobytes() == expected.tobytes()


def test_an_operation_without_an_image_leaves_the_one_before(system: System, picture: Image.Image) -> None:
    answer = system.post(encoded(picture.convert("L")), "?operations=grayscale")
    assert answer.headers["safelight-grayscale"] == "unchanged"
    assert "link" not in answer.headers


def test_an_imported_file_is_an_operation(system: System, picture: Image.Image) -> None:
    answer = system.post(encoded(picture, "WEBP"), "?operations=invert")
    expected = ImageOps.invert(Image.open(io.BytesIO(encoded(picture, "WEBP"))).convert("RGB"))
    assert saved(system, answer).tobytes() == expected.tobytes()


def test_an_image_error_is_the_clients_with_its_sentence(system: System, picture: Image.Image) -> None:
    frames = [picture, ImageOps.invert(picture)]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    answer = system.post(animation.getvalue(), "?operations=grayscale")
    assert answer.status_code == 422
    assert answer.json()["detail"] == "Animations cannot be made grey; send a single picture."
    damaged = system.post(encoded(picture)[:60], "?operations=grayscale")
    assert (damaged.status_code, damaged.json()["error"]) == (422, "unprocessable_image")


def test_the_examples_readme(system: System) -> None:
    text = (PACKAGE / "README.md").read_text()
    command, expected = re.search(r"^\$ (curl .*)\n(\{.*\})$", text, re.MULTILINE).groups()
    words = shlex.split(command.replace("localhost:8080", f"localhost:{system.port}"))
    done = subprocess.run([*words, "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == expected


def test_the_guides_operations(system: System, picture: Image.Image) -> None:
    answer = system.post(encoded(picture), "?operations=brightness,frame")
    mean = round(sum(picture.convert("L").tobytes()) / (16 * 12))
    assert answer.json() == {"status": "SUCCESS", "brightness": mean}
    assert answer.headers["safelight-frame"] == "2 pixels"
    framed = saved(system, answer)
    assert framed.size == (20, 16)
    assert framed.convert("RGB").crop((2, 2, 18, 14)).tobytes() == picture.tobytes()
    assert framed.convert("RGB").getpixel((0, 0)) == (0, 0, 0)


def test_workers_tell_what_they_offer(system: System) -> None:
    command = [sys.executable, "-m", "safelight", "operations", "--json", "--port", str(system.port)]
    offers = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert set(offers) >= {"size", "mirror", "grayscale", "dimensions", "invert", "brightness", "frame"}


def test_the_page_that_follows_a_request_names_what_there_is() -> None:
    named = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", (ROOT / "docs" / "explained.md").read_text())
    assert len(named) > 25
    for path, name in named:
        module = importlib.import_module(
            f"safelight.{path.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        )
        if name:
            operator.attrgetter(name)(module)
