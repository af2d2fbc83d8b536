from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from safelight import operations
from safelight.errors import ConfigurationError, UnknownOperationError
from safelight.operations import Result, load, run
from safelight.operations.mirror import mirror
from safelight.operations.size import size


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module into the current folder and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    written = []

    def write(source: str) -> str:
        name = f"users_own_{len(written)}"
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_the_installed_operations() -> None:
    assert load() == {"size": size, "mirror": mirror}


def test_a_module_of_the_current_folder_adds_its_public_functions(module) -> None:
    name = module(
        "from os.path import join\nimport json\n"
        "def invert(image): return image[::-1]\n"
        "def _own(image): return image\n"
        "class Thing: pass\n"
    )
    found = load([name])
    assert sorted(found) == ["invert", "mirror", "size"]
    assert found["invert"](b"abc") == b"cba"


def test_a_modules_all_wins(module) -> None:
    name = module(
        "import functools\n"
        "def one(image): return {}\n"
        "def other(image, by): return {}\n"
        "two = functools.partial(other, by=2)\n"
        "__all__ = ['two']\n"
    )
    assert sorted(load([name])) == ["mirror", "size", "two"]


def test_the_same_module_twice_is_no_conflict(module) -> None:
    name = module("def grey(image): return image\n")
    assert "grey" in load([name, name])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import nonexistent_thing\n", "cannot be imported: ModuleNotFoundError: No module named 'nonexistent_thing'"),
        ("1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
        ("X = 1\n", "defines no public function"),
        ("__all__ = ['missing']\n", "has no 'missing'"),
        ("__all__ = ['number']\nnumber = 3\n", "'number' of 'users_own_0' is no operation"),
        ("def Shout(image): return image\n", "'Shout' of 'users_own_0' cannot have that name"),
        ("def a" + "b" * 64 + "(image): return image\n", "cannot have that name"),
        ("async def later(image): return image\n", "must be an ordinary function"),
        ("def mirror(image): return image\n", "has the name of another one"),
    ],
)
def test_what_cannot_be_used_is_one_clear_sentence(module, source: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load([module(source)])
    assert sentence in caught.value.detail
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize("name", ["no_such_module", "no_such_module.inner"])
def test_a_module_that_does_not_exist(module, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"There is no module '{name}'"):
        load([name])


def test_an_installed_operation_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("blur", "no_such_module:blur", operations.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    with pytest.raises(ConfigurationError, match="installed operation 'blur'"):
        load()


def test_each_step_sees_the_image_as_the_one_before_left_it() -> None:
    steps = {
        "add": lambda image, what=b"!": image + what.encode() if isinstance(what, str) else image + what,
        "length": lambda image: {"length": len(image)},
        "both": lambda image: Result(image.upper(), {"was": image.decode()}, {"note": "upper"}),
    }
    got = run(steps, [("add", {"what": "b"}), ("length", {}), ("both", {}), ("add", {})], b"a")
    assert got == Result(b"AB!", {"length": 2, "was": "ab"}, {"note": "upper"})


def test_no_step_that_returns_an_image_means_no_image() -> None:
    assert run({"size": size}, [("size", {})], b"x" * 5000) == Result(None, {"size": "5kb"}, {})
    assert run({}, [], b"x") == Result()


@pytest.mark.parametrize("image", [bytearray(b"x"), memoryview(b"x")])
def test_other_kinds_of_bytes_become_bytes(image: object) -> None:
    assert run({"own": lambda _: image}, [("own", {})], b"").image == b"x"


@pytest.mark.parametrize("returned", [None, "text", 3, [b"x"]])
def test_what_an_operation_must_not_return(returned: object) -> None:
    with pytest.raises(TypeError, match=f"'own' returned {type(returned).__name__}; an operation returns bytes"):
        run({"own": lambda _: returned}, [("own", {})], b"")


def test_a_step_that_is_not_there() -> None:
    with pytest.raises(UnknownOperationError, match="'blur'"):
        run({}, [("blur", {})], b"")


@pytest.mark.parametrize(
    ("length", "said"),
    [(0, "1kb"), (1, "1kb"), (1535, "1kb"), (1536, "2kb"), (2559, "2kb"), (2560, "3kb"), (84_064, "82kb")],
)
def test_size_rounds_half_up(length: int, said: str) -> None:
    assert size(bytes(length)) == {"size": said}


def test_the_test_image_has_82_kb() -> None:
    image = Path(__file__).parents[2] / "test_image.jpg"
    assert size(image.read_bytes()) == {"size": "82kb"}
