"""A judge of `mirror`, written apart from it: `python tests/judge.py FOLDER…` mirrors and judges every image there.

Each file is mirrored in a process of its own with a limit of time and memory, so that a hang or a crash is seen and
harms nothing; then source and result alone are compared, by decoders and tools that are not the operation's where
there are others (`judging`). One line for each file that is refused or wrong, and a table at the end; the exit code
is 1 if any result was wrong, or any file crashed or hung.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import multiprocessing.util
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from judging import Findings, frames, jpeg, metadata

__all__ = ["judge", "kind_of"]

SECONDS, SLOW_SECONDS = 20.0, 8.0
MEMORY = 2 << 30
OUTCOMES = ("right", "lossless", "reencoded", "unjudged", "refused", "WRONG", "crashed", "hung")
_EXTENSIONS = {"jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "gif", "webp", "bmp", "dib", "tif", "tiff", "avif"}
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP"}
_MAGIC |= {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF"}


def kind_of(data: bytes) -> str | None:
    """The format by its first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp" and (b"avif" in data[8:64] or b"avis" in data[8:64]):
        return "AVIF"
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)


def judge(source: bytes, result: bytes, notes: Mapping[str, str], tool: metadata.ExifTool | None = None) -> Findings:
    """What is wrong with `result` as the mirrored `source`; without a running ExifTool the metadata is not judged."""
    findings = Findings(kind_of(source) or "other")
    if kind_of(result) != findings.format:
        findings.defect(f"the result is not in the format {findings.format}")
        return findings
    if "mirror-dropped" in notes:
        findings.remark("dropped", notes["mirror-dropped"])
    (jpeg if findings.format == "JPEG" else frames).judge(source, result, notes, findings)
    if tool is not None:
        metadata.judge(source, result, tool, findings)
    return findings


@dataclass
class Verdict:
    """Of one file."""

    path: Path
    format: str
    outcome: str
    text: str = ""
    way: str = ""  # lossless, reencoded
    remarks: list[tuple[str, str]] = field(default_factory=list)


def _mirrored(path: Path, answer: Path) -> None:
    """In a process of its own: the result's bytes and notes, or the sentence of the refusal."""
    mirror = importlib.import_module("safelight.operations.mirror").mirror
    refusal = importlib.import_module("safelight.errors").SafelightError
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    image = path.read_bytes()
    try:
        result = mirror(image)
    except refusal as error:
        facts = {"refused": error.detail, "status": error.status}
    except BaseException as error:  # noqa: BLE001 - every other one is a defect, and is told as one
        where = traceback.extract_tb(error.__traceback__)[-1]
        facts = {"crashed": f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"}
    else:
        answer.with_suffix(".image").write_bytes(result.image or b"")
        facts = {"notes": dict(result.notes)}
    answer.write_text(json.dumps(facts))


_tools: list[metadata.ExifTool] = []


def _verdict(path: Path) -> Verdict:
    source = path.read_bytes()
    kind = kind_of(source) or "other"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        began = time.perf_counter()
        worker = multiprocessing.get_context("fork").Process(target=_mirrored, args=(path, answer))
        worker.start()
        worker.join(SECONDS)
        seconds = time.perf_counter() - began
        if worker.is_alive():
            worker.kill()
            worker.join()
            return Verdict(path, kind, "hung", f"over {SECONDS:.0f} s")
        if not answer.exists():
            return Verdict(path, kind, "crashed", f"exit code {worker.exitcode}")
        facts = json.loads(answer.read_text())
        if "notes" not in facts:
            outcome = "refused" if "refused" in facts else "crashed"
            text = f"{facts[outcome]} ({facts['status']})" if outcome == "refused" else facts[outcome]
            return Verdict(path, kind, outcome, text)
        result = answer.with_suffix(".image").read_bytes()
    verdict = _judged(path, kind, source, result, facts["notes"])
    if seconds > SLOW_SECONDS:
        verdict.remarks.append(("slow", f"{seconds:.1f} s"))
    return verdict


def _judged(path: Path, kind: str, source: bytes, result: bytes, notes: dict[str, str]) -> Verdict:
    if not _tools:
        _tools.append(metadata.ExifTool())
        multiprocessing.util.Finalize(_tools[0], _tools[0].close, exitpriority=0)  # a worker runs no atexit
    try:
        findings = judge(source, result, notes, _tools[0])
    except Exception as error:  # noqa: BLE001 - a judge that fails has not judged
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"the judge failed: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return Verdict(path, kind, "unjudged", text, notes["mirror"])
    outcome = "WRONG" if findings.defects else "right" if findings.judges else "unjudged"
    text = "; ".join(findings.defects) or ("" if findings.judges else "no decoder can read the source")
    return Verdict(path, kind, outcome, text, notes["mirror"], findings.remarks)


def _images(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.is_file() and (path.suffix[1:].lower() in _EXTENSIONS or _has_magic(path)):
                yield path


def _has_magic(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64)
    return kind_of(head) is not None and not head.startswith(b"BM")  # which begins many a text


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _tell_table(verdicts: list[Verdict]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for verdict in verdicts:
        counts[verdict.format, verdict.outcome] += 1
        if verdict.outcome == "right":
            counts[verdict.format, verdict.way] += 1
    _tell(f"\n{'':8}" + "".join(f"{name:>11}" for name in OUTCOMES))
    for kind in sorted({kind for kind, _ in counts}):
        _tell(f"{kind:8}" + "".join(f"{counts[kind, name]:11,}" for name in OUTCOMES))
    remarks = Counter(name for verdict in verdicts for name, _ in verdict.remarks)
    _tell(f"\n{len(verdicts):,} files. " + ", ".join(f"{name}: {count:,}" for name, count in remarks.most_common()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    importlib.import_module("safelight.operations.mirror")  # once, before each process is forked
    warnings.simplefilter("ignore")  # Pillow's, of damaged files
    paths = list(_images(options.folders))
    verdicts = []
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("fork")) as pool:
        for verdict in pool.map(_verdict, paths):
            verdicts.append(verdict)
            if verdict.outcome != "right":
                _tell(f"{verdict.outcome:8} {verdict.format:5} {verdict.path}: {verdict.text}")
            for name, details in verdict.remarks:
                if details:
                    _tell(f"{name:8} {verdict.format:5} {verdict.path}: {details}")
    _tell_table(verdicts)
    return int(any(verdict.outcome in ("WRONG", "crashed", "hung") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
