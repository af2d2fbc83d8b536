"""How the metadata is judged: every tag that ExifTool finds in the source has its value in the result too.

What may differ is listed with its reason; all else (EXIF, XMP, IPTC, ICC profiles as a whole, comments) must not.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from judging import Findings, psnr

__all__ = ["ExifTool", "judge"]

PREVIEW_DB = 30.0
_PREVIEW = r"(Thumbnail|Preview|Other|Large)Image$"

# Each with the reason why it says nothing about what was kept.
_MAY_DIFFER = (
    (r"SourceFile|System:|ExifTool:(ExifToolVersion|Version)", "of the file on the disk, or of the tool"),
    (r"Composite:", "worked out from other tags"),
    (r"File:(FileSize|CurrentIPTCDigest)", "of the file as a whole"),
    (rf"IFD1:|Thumbnail(Offset|Length|TIFF)|{_PREVIEW}", "a small picture may be dropped, or be mirrored too"),
    (r":Unknown_i(mir|rot)|Track\d+:ChunkOffset", "how an AVIF is turned, and places"),
    (r"QuickTime:MediaData", "coded data, which is judged as displayed; the thumbnail in its EXIF may be dropped"),
    (r"MPImage\d*:MPImage(Start|Length|\d+)", "pictures of their own, judged as such, and their places"),
    (r":(Strip|Tile)(Offsets|ByteCounts)|:SubIFD\w*Offset", "places and sizes inside a TIFF"),
    (r"SubIFD\d*:(PreviewTIFF|JpgFromRaw\w*)", "a TIFF's pages in other pages: mirrored pictures too"),
    (r":(Preview|Other)\w*(Start|Offset|Length)|:ImageData(Offset|Location)", "places, and sizes of small pictures"),
    (r"(Directory|Container)\w*Item\w*Length|ContainerDirectory|:Directory$", "sizes, judged with the pictures"),
    (r"GIF:Image(Width|Height)", "a screen smaller than its first frame is made as large as it is displayed"),
    (r"PNG:ModifyDate", "the time of the last change to the pixels, which is no longer true: counted if it is gone"),
    (r"PNG:Interlace", "an interlaced picture becomes a plain one: the same pixels in another order"),
    (r"RIFF:(VP8Version|AlphaFilter\w*|AlphaPreprocessing|AlphaCompression)|RIFF:\w+Scale", "WebP's coding tools"),
    (r"(BMP|File):(ImageLength|ProfileDataOffset)|BMP:\w*FileSize", "places and sizes inside a BMP"),
    (r"Meta:|QuickTime:(MediaData(Offset|Size)|Rotation|Mirror\w*|ImageRotation)", "boxes that mirror an AVIF"),
)
_IGNORED = re.compile("|".join(pattern for pattern, _ in _MAY_DIFFER))
_DROPPED = {"extra pictures": r"MPF\d|MPImage\d", "layers": r"Photoshop:Layer|IFD0:ImageSourceData"}  # note -> tags


class ExifTool:
    """One running ExifTool that answers for file after file."""

    def __init__(self) -> None:
        options = "-stay_open True -@ - -common_args -j -a -u -n -b -struct -G1:4"
        self._process = subprocess.Popen(
            ["exiftool", *options.split()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def read(self, data: bytes, extension: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile(suffix=f".{extension}") as file:
            Path(file.name).write_bytes(data)
            self._process.stdin.write(f"-all\n-icc_profile\n{file.name}\n-execute\n".encode())
            self._process.stdin.flush()
            said = b""
            while not said.endswith(b"{ready}\n"):
                line = self._process.stdout.readline()
                if not line:
                    raise RuntimeError("ExifTool has ended")
                said += line
        answer = json.loads(said.removesuffix(b"{ready}\n") or b"[{}]")
        return dict(answer[0])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"-stay_open\nFalse\n")
        self._process.stdin.close()
        self._process.wait(timeout=10)
        if self._process.stdout is not None:
            self._process.stdout.close()


def judge(source: bytes, result: bytes, tool: ExifTool, findings: Findings) -> None:
    extension = findings.format.lower()
    before, after = tool.read(source, extension), tool.read(result, extension)
    _judge_previews(before, after, findings)
    _count_dropped(before, after, findings)
    for what in [details for kind, details in findings.remarks if kind == "dropped" and details in _DROPPED]:
        before, after = (
            {key: value for key, value in tags.items() if not re.match(_DROPPED[what], key)} for tags in (before, after)
        )
    old, new = _grouped(before), _grouped(after)
    for key in ("ExifTool:Warning", "ExifTool:Error"):
        warned, warnings = old.pop(key, []), new.pop(key, [])
        if warnings and not warned:
            findings.defect(f"ExifTool on the result: {warnings[0]}")
    wrong = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    for key in wrong[:3]:
        findings.defect(f"{key}: {_short(old.get(key))} became {_short(new.get(key))}")
    if len(wrong) > 3:
        findings.defect(f"and {len(wrong) - 3} more tags differ")


def _judge_previews(before: dict[str, Any], after: dict[str, Any], findings: Findings) -> None:
    """Those that are still there must show the mirrored picture: they are small, so what is wrong differs clearly."""
    turned = before.get("IFD1:Orientation", before.get("IFD0:Orientation", 1))
    flip = Image.Transpose.FLIP_TOP_BOTTOM if turned in (5, 6, 7, 8) else Image.Transpose.FLIP_LEFT_RIGHT
    for key in before:
        old, new = _preview(before, key), _preview(after, key)
        kind = "thumbnail" if key == "IFD1:ThumbnailImage" else "preview"
        if old is None or findings.format == "TIFF":  # there, ExifTool takes a strip for one
            continue
        if new is None:
            data = base64.b64decode(str(after.get(key, "")).removeprefix("base64:"))
            if data.strip(b"\0"):
                findings.defect(f"{key} can no longer be read")
            else:  # gone, or blanked where it stood
                findings.remark(f"{kind} dropped")
            continue
        number = psnr(old.transpose(flip), new) if old.size == new.size else 0.0
        if number >= PREVIEW_DB or number > psnr(old, new) + 6:
            findings.remark(f"{kind} mirrored")
        elif kind == "thumbnail":
            findings.defect(f"the thumbnail does not show the mirrored picture ({number:.1f} dB)")
        else:
            findings.remark("preview not mirrored", key)


def _preview(tags: dict[str, Any], key: str) -> Image.Image | None:
    data = str(tags.get(key, ""))
    if not re.search(_PREVIEW, key) or not data.startswith("base64:"):
        return None
    try:
        return Image.open(io.BytesIO(base64.b64decode(data[7:]))).convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None


def _count_dropped(before: dict[str, Any], after: dict[str, Any], findings: Findings) -> None:
    if "PNG:ModifyDate" in before and "PNG:ModifyDate" not in after:
        findings.remark("modification time dropped")
    if before.get("PNG:Interlace") and not after.get("PNG:Interlace"):
        findings.remark("interlaced became plain")


def _grouped(tags: dict[str, Any]) -> dict[str, list[str]]:
    """By group and name, whichever of several of the same name ExifTool met first."""
    groups: dict[str, list[str]] = {}
    for numbered, value in tags.items():
        key = re.sub(r":Copy\d+", "", numbered)
        if not _IGNORED.search(key):
            groups.setdefault(key, []).append(repr(value))
    return {key: sorted(values) for key, values in groups.items()}


def _short(values: list[str] | None) -> str:
    text = "nothing" if values is None else ", ".join(values)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"
