"""C3: where the new pieces (strips, tiles) of a TIFF go: over the old ones as far as there is room.

Nothing that is not a piece moves, with one exception. The places of the old pieces are joined to runs; each new piece
goes to its own old place, or behind the one before it if that became longer: so what keeps its length keeps its place,
and a file that is not compressed its size. The last run may grow: if it ends the file, or if nothing stands behind it
but directories and values that may be moved (libtiff writes these last). What no longer fits into its run goes to the
smallest room left anywhere that holds it, else behind the end of the file. Room that stays empty is zeroed.
"""

from __future__ import annotations

import bisect
import collections
import itertools
from typing import TYPE_CHECKING, NamedTuple

from safelight.operations.mirror.tiff_file import ALIGNMENT, Place, TiffFile

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Replacement", "rewritten"]

_ENDLESS = 1 << 62
_GHOST_BYTES = 1024  # the header of a cloud-optimised GeoTIFF is shorter, and stands before the first directory


class Replacement(NamedTuple):
    """New pieces for the places of old ones; the directory's number; the tags of the offsets and lengths.

    There is no tag for lengths (None) in some files that are not compressed.
    """

    places: Sequence[Place]
    pieces: Sequence[bytes]
    directory: int
    offsets: int
    lengths: int | None


def rewritten(file: TiffFile, replacements: Sequence[Replacement]) -> bytes:
    """The file with new pieces."""
    pieces = [piece for replacement in replacements for piece in replacement.pieces]
    places = [place for replacement in replacements for place in replacement.places]
    runs = emptied = _runs(file, set(places))
    room_ends = runs[-1].end if runs else 0
    if room_ends == len(file.image) or (runs and file.may_move(room_ends)):
        runs = [*runs[:-1], Place(runs[-1].start, _ENDLESS)]
    else:
        room_ends = len(file.image) + len(file.image) % ALIGNMENT
        runs = [*runs, Place(room_ends, _ENDLESS)]
    starts = _placed(runs, places, pieces)
    end = max(start + len(piece) for start, piece in zip(starts, pieces, strict=True))
    if room_ends < end and room_ends < len(file.image):
        file = file.moved(room_ends, end - room_ends + (end - room_ends) % ALIGNMENT)
    out = bytearray(file.image)
    for run in emptied:
        out[run.start : run.end] = bytes(run.end - run.start)
    for start, piece in sorted(zip(starts, pieces, strict=True)):
        out += bytes(max(0, start - len(out)))
        out[start : start + len(piece)] = piece
    remaining = iter(starts)
    for replacement in replacements:
        entries = file.directories[replacement.directory].entries
        file.patched(out, entries[replacement.offsets], list(itertools.islice(remaining, len(replacement.pieces))))
        if replacement.lengths is not None:
            file.patched(out, entries[replacement.lengths], list(map(len, replacement.pieces)))
    # The pieces of a cloud-optimised GeoTIFF may have left the order that it promises; its header has a word for
    # that, by which readers (GDAL) know not to rely on it.
    head = bytes(out[:_GHOST_BYTES])
    out[: len(head)] = head.replace(b"KNOWN_INCOMPATIBLE_EDITION=NO\n ", b"KNOWN_INCOMPATIBLE_EDITION=YES\n")
    return bytes(out)


def _runs(file: TiffFile, old: set[Place]) -> list[Place]:
    """The old places in order, joined where they touch or have a zero for alignment between them.

    A place that overlaps with anything else stays as it is.
    """
    known = set(file.known())
    everything = sorted((*place, place not in known) for place in old | known)
    runs: list[Place] = []
    covered = 0
    for (start, end, usable), (following, _, _) in itertools.pairwise([*everything, (_ENDLESS, 0, False)]):
        if usable and covered <= start and end <= following:
            if runs and start - runs[-1].end < ALIGNMENT and not any(file.image[runs[-1].end : start]):
                runs[-1] = Place(runs[-1].start, end)
            else:
                runs.append(Place(start, end))
        covered = max(covered, end)
    return runs


def _placed(runs: list[Place], places: list[Place], pieces: list[bytes]) -> list[int]:
    """Where each piece begins."""
    shared = {place for place, uses in collections.Counter(places).items() if uses > 1}
    # Of pieces that shared one place (blank tiles do) equal ones share one again.
    first: dict[bytes, int] = {}
    twins = {n: first.setdefault(pieces[n], n) for n, place in enumerate(places) if place in shared}
    starts = [-1] * len(pieces)
    own = [n for n in sorted(range(len(pieces)), key=lambda n: places[n]) if twins.get(n, n) == n]
    cursors = [run.start for run in runs]
    homeless = []
    for number in own:
        place, length = places[number], len(pieces[number])
        index = bisect.bisect_right(runs, place.start, key=lambda run: run.start) - 1
        start = max(cursors[index], place.start)
        if index >= 0 and place.end <= runs[index].end and start + length <= runs[index].end:
            starts[number], cursors[index] = start, start + length
        else:
            homeless.append(number)
    holes = sorted((run.end - cursor, cursor) for run, cursor in zip(runs, cursors, strict=True))
    for number in sorted(homeless, key=lambda n: -len(pieces[n])):
        starts[number] = _squeezed(holes, len(pieces[number]))
    for number, twin in twins.items():
        starts[number] = starts[twin]
    return starts


def _squeezed(holes: list[tuple[int, int]], length: int) -> int:
    """The start of the smallest hole that is large enough (one is endless), made smaller."""
    room, start = holes.pop(bisect.bisect_left(holes, (length, 0)))
    bisect.insort(holes, (room - length, start + length))
    return start
