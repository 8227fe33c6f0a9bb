"""Rows and token trees on disk, for data larger than memory: written once from front to back, then read at any place.

They are files without a name: nothing is left of them when the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, overload

from align.forest import Tree
from align.schema import Row


class RowFile(Sequence[Any]):
    """Validated rows of one kind in a file: a sequence that holds one of them in memory at a time.

    It is read from front to back; an index walks there from the beginning.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed with this object
        self._class: type[Row] | None = None
        self._length = 0

    def append(self, row: Row) -> None:
        """Add a row, of the kind of those before."""
        self._class = type(row)
        self._file.write(row.model_dump_json(exclude_none=True).encode() + b"\n")
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        self._file.flush()
        place, rest = 0, b""
        while block := os.pread(self._file.fileno(), 1 << 20, place):
            place += len(block)
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield self._class.model_validate_json(line)  # type: ignore[union-attr]

    def __getitem__(self, index: Any) -> Any:
        place = range(self._length)[index]
        return next(row for i, row in enumerate(self) if i == place)


class TreeFile(Sequence[Tree]):
    """Token trees in files: 4 bytes a token, and none of them in memory.

    All have as many branches, and the same `values` of the same lengths.
    """

    def __init__(self, folder: Path, trees: Iterable[Tree]) -> None:
        """Write `trees` to `folder`.

        Raises:
            ValueError: they are not alike.
        """
        self.folder, self.longest = folder, 0
        self._length = 0
        self._shape: tuple[int, bool, tuple[tuple[str, int], ...]] | None = None
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile(dir=folder) for _ in range(4)]  # noqa: SIM115
        self._write(trees, *self._files)
        for file in self._files:
            file.flush()

    def _write(self, trees: Iterable[Tree], tokens: IO[bytes], starts: IO[bytes], masks: IO[bytes], values: IO[bytes]) -> None:
        place = 0
        starts.write(array("q", [0]).tobytes())
        for tree in trees:
            names = tuple((name, len(numbers)) for name, numbers in tree.values.items())
            shape = len(tree.branches), tree.prompt_mask is not None, names
            if shape != (self._shape or shape):
                raise ValueError(f"a tree of branches, mask and values {shape} among trees of {self._shape}")
            self._shape = shape
            ends = array("q")
            for piece in (tree.prompt, *tree.branches):
                tokens.write(array("i", piece).tobytes())
                place += len(piece)
                ends.append(place)
            starts.write(ends.tobytes())
            masks.write(bytes(tree.prompt_mask or ()))
            for numbers in tree.values.values():
                values.write(array("d", numbers).tobytes())
            self.longest, self._length = max(self.longest, tree.longest), self._length + 1

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        place = range(self._length)[index]
        assert self._shape is not None
        branches, masked, names = self._shape
        tokens, starts, masks, values = self._files
        ends = self._read(starts, "q", place * (branches + 1), branches + 2)
        pieces = self._read(tokens, "i", ends[0], ends[-1] - ends[0])
        prompt, *answers = (pieces[start - ends[0] : end - ends[0]] for start, end in pairwise(ends))
        mask = [bool(byte) for byte in self._read(masks, "B", ends[0], len(prompt))] if masked else None
        width = sum(length for _, length in names)
        numbers = iter(self._read(values, "d", place * width, width))
        return Tree(prompt, tuple(answers), mask, {name: list(islice(numbers, length)) for name, length in names})

    @staticmethod
    def _read(file: IO[bytes], kind: str, place: int, count: int) -> list[Any]:
        """`count` numbers at `place`. No position of the file is moved: other processes may read it, too."""
        found = array(kind)
        found.frombytes(os.pread(file.fileno(), count * found.itemsize, place * found.itemsize))
        return found.tolist()
