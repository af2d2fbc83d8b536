"""C3: libjpeg-turbo's lossless transform, by a small ctypes binding.

The library comes from the system, else from the PyPI wheel `turbojpeg`. Facts that this file is built on, each held
by a test against every library that is found:

- `tjTransform` of a 2.1.92 beta (the wheel's) drops EXIF, ICC and comments, and a transform adds JFIF where there was
  none: so no library is asked to copy markers, `jpeg` puts the source's own back.
- A handle that made a progressive or optimised picture writes a wrong next one and reports success (until 3.1.0): so
  every picture gets a fresh handle, which costs 0.7 us.
- Warnings come as failures whose output is nevertheless complete; `_HARMLESS` tells which of them are harmless.
- A 2.x library knows no Huffman tables of a baseline picture's own, no arithmetic coding and no sampling factors
  beyond the usual ones: `find` gives a 3.x library for those, if one is there.

https://github.com/libjpeg-turbo/libjpeg-turbo/blob/main/src/turbojpeg.h
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight import formats
from safelight.operations.mirror.exif import Axis

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ARITHMETIC",
    "MAX_SCANS",
    "OPTIMISED",
    "PROGRESSIVE",
    "DamageError",
    "Library",
    "UnsupportedError",
    "candidates",
    "describe",
    "find",
    "open_library",
]

MAX_SCANS = 500
"""Each scan of a progressive picture is a pass over all of it; real ones have about 10. Fixed in a 2.x library."""

PROGRESSIVE, ARITHMETIC, OPTIMISED = 32, 128, 256  # TJXOPT_…; a 2.x library knows only the first, and ignores the rest

_PERFECT, _NO_OUTPUT, _COPY_NONE = 1, 16, 64
_FLIPS = {Axis.HORIZONTAL: 1, Axis.VERTICAL: 2}  # TJXOP_HFLIP, TJXOP_VFLIP
_INIT_TRANSFORM = 2
_NEWER = OPTIMISED | ARITHMETIC  # what a 2.x library ignores
_LIMIT_SCANS_FLAG = 32768  # TJFLAG_LIMITSCANS of 2.1
_LIMITS = {13: MAX_SCANS, 23: 2048, 24: formats.MAX_PIXELS}  # TJPARAM_SCANLIMIT, _MAXMEMORY (MB), _MAXPIXELS

# Neither changes a coefficient: stray bytes between segments, and labels that a decoder has to guess.
_HARMLESS = ("extraneous bytes before marker", "unknown JFIF revision", "Unknown Adobe color transform")

_UNSUPPORTED = ("subsampling", "Sampling factors too large", "3 or fewer components")

_SYSTEM_NAMES = (
    ("libturbojpeg.0.dylib", "/opt/homebrew/lib/libturbojpeg.0.dylib", "/usr/local/lib/libturbojpeg.0.dylib")
    if sys.platform == "darwin"
    else ("libturbojpeg.so.0",)
)


class DamageError(Exception):
    """The library could not read the picture, or had to make up part of it; the text is the library's."""


class UnsupportedError(DamageError):
    """The picture may be whole, but is of a kind that the library does not take."""


class _Transform(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_int),
        ("y", ctypes.c_int),
        ("w", ctypes.c_int),
        ("h", ctypes.c_int),
        ("op", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("custom_filter", ctypes.c_void_p),
    )


class Library:
    """One loaded libturbojpeg; `optimises` says whether it is a 3.x one, which writes every kind of JPEG."""

    def __init__(self, name: str) -> None:
        library = ctypes.CDLL(name)
        self.name = name
        self._is_3 = self.optimises = hasattr(library, "tj3Transform")
        prefix = "tj3" if self._is_3 else "tj"
        self._init = library.tj3Init if self._is_3 else library.tjInitTransform
        self._transform = getattr(library, f"{prefix}Transform")
        self._error = library.tj3GetErrorStr if self._is_3 else library.tjGetErrorStr2
        self._is_fatal = getattr(library, f"{prefix}GetErrorCode")
        self._alloc = getattr(library, f"{prefix}Alloc")
        self._free = getattr(library, f"{prefix}Free")
        self._destroy = getattr(library, f"{prefix}Destroy")
        self._set = library.tj3Set if self._is_3 else None
        self._init_decompress = library.tjInitDecompress
        self._to_planes = library.tjDecompressToYUVPlanes
        self._size = ctypes.c_size_t if self._is_3 else ctypes.c_ulong
        self._declare()

    def _declare(self) -> None:
        handle, buffers = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
        size, sizes = self._size, ctypes.POINTER(self._size)
        transforms = ctypes.POINTER(_Transform)
        flags = [] if self._is_3 else [ctypes.c_int]
        _typed(self._init, handle, [ctypes.c_int] if self._is_3 else [])
        _typed(
            self._transform,
            ctypes.c_int,
            [handle, ctypes.c_char_p, size, ctypes.c_int, buffers, sizes, transforms, *flags],
        )
        _typed(self._error, ctypes.c_char_p, [handle])
        _typed(self._is_fatal, ctypes.c_int, [handle])
        _typed(self._alloc, ctypes.c_void_p, [size if self._is_3 else ctypes.c_int])
        _typed(self._free, None, [ctypes.c_void_p])
        _typed(self._destroy, None, [handle])
        _typed(self._init_decompress, handle, [])
        ints = ctypes.POINTER(ctypes.c_int)
        planes = [handle, ctypes.c_char_p, ctypes.c_ulong, buffers, ctypes.c_int, ints, ctypes.c_int, ctypes.c_int]
        _typed(self._to_planes, ctypes.c_int, planes)
        if self._set is not None:
            _typed(self._set, ctypes.c_int, [handle, ctypes.c_int, ctypes.c_int])

    def flip(self, jpeg: bytes, axis: Axis, options: int = 0) -> bytes:
        """The JPEG flipped in the DCT domain, without its markers.

        Raises `DamageError` for one that is damaged or cut short, or whose edge is not a whole number of MCUs.
        """
        return self._run(jpeg, _FLIPS[axis], options | _PERFECT | _COPY_NONE)

    def rewritten(self, jpeg: bytes, options: int = 0) -> bytes:
        """The same coefficients, in another kind of JPEG."""
        return self._run(jpeg, 0, options | _COPY_NONE)

    def check(self, jpeg: bytes) -> None:
        """Raise `DamageError` unless every coefficient can be read."""
        self._run(jpeg, 0, _NO_OUTPUT)

    def planes(self, jpeg: bytes, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
        """Each component's own samples, neither upsampled nor converted; `sizes` are their widths and heights.

        Raises `DamageError`, and `UnsupportedError` for four components or unusual sampling factors.
        """
        handle = self._init_decompress()
        try:
            planes = [ctypes.create_string_buffer(width * height) for width, height in sizes]
            pointers = (ctypes.c_void_p * len(planes))(*map(ctypes.addressof, planes))
            strides = (ctypes.c_int * len(planes))(*(width for width, _ in sizes))
            if self._to_planes(handle, jpeg, len(jpeg), pointers, 0, strides, 0, _LIMIT_SCANS_FLAG):
                self._raise(handle)
            return [plane.raw for plane in planes]
        finally:
            self._destroy(handle)

    def _run(self, jpeg: bytes, op: int, options: int) -> bytes:
        handle = self._init(_INIT_TRANSFORM) if self._is_3 else self._init()
        # Most results are as long as the source; the library makes the buffer longer where they are not.
        size = self._size(len(jpeg) + len(jpeg) // 16 + 4096)
        buffer = ctypes.c_void_p(self._alloc(size.value))
        try:
            if self._set is not None:
                for parameter, value in _LIMITS.items():
                    self._set(handle, parameter, value)  # those that a library is too old to know are refused
            transform = _Transform(op=op, options=options)
            flags = () if self._is_3 else (_LIMIT_SCANS_FLAG,)
            if self._transform(handle, jpeg, len(jpeg), 1, buffer, size, transform, *flags):
                self._raise(handle)
            return b"" if options & _NO_OUTPUT else ctypes.string_at(buffer, size.value)
        finally:
            self._free(buffer)
            self._destroy(handle)

    def _raise(self, handle: Any) -> None:
        """Raise what the library complains of, unless it is a harmless warning."""
        message = self._error(handle).decode("ascii", "replace")
        if any(known in message for known in _UNSUPPORTED):
            raise UnsupportedError(message)
        if self._is_fatal(handle) or not any(known in message for known in _HARMLESS):
            raise DamageError(message)

    def __str__(self) -> str:
        found = re.search(rb"libjpeg-turbo version ([\d.]+)", Path(self._path()).read_bytes())
        origin = "the wheel turbojpeg" if "turbojpeg.libs" in self.name or ".dylibs" in self.name else "the system"
        return f"libjpeg-turbo {found[1].decode() if found else '(unknown version)'} from {origin}"

    def _path(self) -> str:
        class Info(ctypes.Structure):
            _fields_ = (("name", ctypes.c_char_p), ("rest", ctypes.c_void_p * 3))

        info = Info()
        ctypes.CDLL(None).dladdr(ctypes.cast(self._destroy, ctypes.c_void_p), ctypes.byref(info))
        return str(info.name, "utf-8")


def _typed(function: Any, returns: Any, arguments: list[Any]) -> None:
    function.restype, function.argtypes = returns, arguments


def candidates() -> list[str]:
    """Where the library may be, the system's first, then the one inside the wheel `turbojpeg` (not imported)."""
    names = list(_SYSTEM_NAMES)
    wheel = importlib.util.find_spec("turbojpeg")
    if wheel is not None and wheel.origin is not None:
        for folder in ("turbojpeg.libs", ".dylibs", "turbojpeg/.dylibs"):
            names += sorted(map(str, Path(wheel.origin).parent.joinpath(folder).glob("libturbojpeg*")))
    return names


@functools.cache
def open_library(name: str) -> Library | None:
    """The library of that name or path, or None if it cannot be loaded or is older than 2.0."""
    try:
        return Library(name)
    except (OSError, AttributeError):
        return None


@functools.cache
def find(options: int = 0) -> Library | None:
    """The library to use for such a picture: the first one that writes its kind, else the first one."""
    found = [library for library in map(open_library, candidates()) if library is not None]
    return next(
        (library for library in found if library.optimises or not options & _NEWER), found[0] if found else None
    )


def describe() -> str:
    """One line for a start-up message: which library mirrors JPEGs, or how to install it."""
    if (library := find()) is not None:
        return str(library)
    command = "brew install jpeg-turbo" if sys.platform == "darwin" else "apt-get install libturbojpeg0"
    return f"no libjpeg-turbo, so JPEGs are re-encoded; to mirror them losslessly: {command}"
