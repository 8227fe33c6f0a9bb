"""The bytes and the text of a file, without its compression. Refused is what is plainly something else than its name says."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from pathlib import Path
from typing import IO, Any

from align.errors import AlignError

POINTER = b"version https://git-lfs.github.com/"
"""What a file of Git LFS begins with where its content was not fetched."""

OTHERS = {
    b"\x1f\x8b": "is gzipped, and its name does not say so: add .gz to it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd, and its name does not say so: add .zst to it",
    b"PK\x03\x04": "is a zip archive or a file of Excel: unpack it, or save it as .csv",
}
"""What files begin with that hold no text, and what to do about them."""

LOOKED_AT = 4096
"""Bytes of a file by which its encoding is told."""


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file of text, without its compression.

    Raises:
        AlignError: they are no UTF-8, but UTF-16 or UTF-32, as some programs on Windows write it, or no text at all.
    """
    stream: Any = decompressed(path)
    start = stream.peek(LOOKED_AT)[:LOOKED_AT]
    wrong = next((told for magic, told in OTHERS.items() if start.startswith(magic)), None) or _wide(start, path.name)
    if wrong:
        stream.close()
        raise AlignError(f"{path}: {wrong}")
    return stream


WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
"""Encodings by the mark that a file begins with; that of UTF-32 begins with one of UTF-16."""


def _wide(start: bytes, name: str) -> str | None:
    """What to say of a file that is UTF-16 or UTF-32. Without a mark UTF-16 is known by its zero bytes, one half of many letters;
    those that a crash leaves in a file stand side by side.
    """
    marked = next((encoding for mark, encoding in WIDE.items() if start.startswith(mark)), None)
    first, second = start[::2].count(0), start[1::2].count(0)
    if marked is None and not (max(first, second) > max(len(start) / 10, 1) and 10 * min(first, second) < max(first, second)):
        return None
    encoding = marked or ("UTF-16LE" if second > first else "UTF-16BE")
    found = f"is {encoding}" if marked else f"looks like {encoding}, as many of its bytes are zero"
    return f"{found}, expected UTF-8; convert it: iconv -f {encoding} -t UTF-8 {name}"


def decompressed(path: Path) -> Any:
    """The bytes of a file, without its compression; a binary stream that can `peek`.

    Raises:
        AlignError: it is not compressed as its name says, or was never fetched.
    """
    packed = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise AlignError(f"{path}: is a pointer of Git LFS, not the file that it stands for; fetch that: git lfs pull")
    if packed not in (".gz", ".zst"):
        return path.open("rb")
    # A frame of zstd may be one to be skipped.
    sound = start[:2] == b"\x1f\x8b" if packed == ".gz" else start[:4] == b"\x28\xb5\x2f\xfd" or start[1:4] == b"\x2a\x4d\x18"
    if start and not sound:
        raise AlignError(f"{path}: is not compressed as its name says; take {packed} off its name, or download it again")
    return gzip.open(path) if packed == ".gz" else io.BufferedReader(_Zst(path))


class _Zst(io.RawIOBase):
    """The content of a .zst file. zstandard's own reader takes a file that was cut for one that ends there."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise AlignError(f"{path}: reading .zst needs the package zstandard: pip install 'align[zst]'") from None
        self._file = path.open("rb")
        self._frame_of = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None  # the one that has begun and not ended
        self._rest, self._ready = b"", memoryview(b"")  # not decompressed yet, not given out yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # Little at a time: what repeats itself takes up thousands of times as much memory.
            piece = self._rest or self._file.read(1 << 13)
            if not piece and self._frame is not None:
                raise EOFError("Compressed file ended before the end of its last frame")
            if not piece:
                return 0
            frame = self._frame or self._frame_of()
            self._ready = memoryview(frame.decompress(piece))
            self._rest, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        taken, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_text(path: Path, *, newline: str | None = None) -> IO[str]:
    """The text of a file. Bytes that are not UTF-8 become lone surrogates, which `broken_text` finds in the row where they stand.

    Raises:
        AlignError: as `open_bytes`.
    """
    return io.TextIOWrapper(open_bytes(path), "utf-8-sig", "surrogateescape", newline)


_ESCAPED = re.compile("[\udc80-\udcff]")


def broken_text(text: str) -> str | None:
    """What is wrong with `text`, if a byte of it was not UTF-8."""
    found = None if text.isascii() else _ESCAPED.search(text)
    return (
        None if found is None else f"byte {ord(found[0]) - 0xDC00:#04x} at character {found.start() + 1} is not UTF-8; convert it"
    )
