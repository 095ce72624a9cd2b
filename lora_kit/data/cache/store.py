"""The cache on disk: key → a few tensors, in immutable shards that any number of processes fill together.

    FOLDER/shards/…     what is cached; a shard is written under another name, then renamed: it is whole or not there
    FOLDER/damaged/…    shards that were set aside, and a note for each damaged entry of the others

There is no lock and no common index. Every process writes shards of its own, named by their content, so that two
processes that make the same entry do no harm, and whoever opens the folder later sees all of it. A process that is
killed loses the shard it was collecting.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from lora_kit.data.cache.keys import KEY_BYTES
from lora_kit.data.cache.shard import (
    CHECKSUM_BYTES,
    SHARD_NAME,
    DamagedError,
    Entry,
    Part,
    Tensors,
    read_entry,
    read_shard,
    write_shard,
)
from lora_kit.data.cache.table import KeyTable, Rows, new_rows, row_type
from lora_kit.errors import DataError
from lora_kit.files import write_text

SHARD_BYTES = 1 << 26
"""64 MiB: 512 pictures of 512 px in fp32. Twice this is held in memory while a shard is written."""
SHARD_SECONDS = 60.0
"""A shard is written after this time however small it is: no kill loses more work."""

_ROW = row_type(
    KEY_BYTES, ("checksum", f"V{CHECKSUM_BYTES}"), ("begin", "u8"), ("shard", "u4"), ("layout", "u4"), ("bad", "?")
)


class CacheStore:
    """A folder of entries. Reading and writing may be mixed; can be pickled while nothing waits to be written."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, shard_seconds: float = SHARD_SECONDS) -> None:
        """Open a folder; it need not exist yet. Reads the shards' headers: 0.1 s for 10 k pictures."""
        self.folder = folder
        self.notices: list[str] = []
        """What was found damaged and set aside by this process, a line each."""
        self._limits = (shard_bytes, shard_seconds)
        self._shards: list[Path] = []
        self._refused: set[str] = set()
        """Names of damaged shards that could not be moved."""
        self._layouts: list[tuple[Part, ...]] = []
        self._table = KeyTable(_ROW)
        self._waiting: dict[bytes, Tensors] = {}
        self._waiting_bytes = 0
        self._since = 0.0
        self.refresh()

    @property
    def shard_folder(self) -> Path:
        """Where the shards lie."""
        return self.folder / "shards"

    @property
    def damaged_folder(self) -> Path:
        """Where damaged shards are moved, and damaged entries noted."""
        return self.folder / "damaged"

    @property
    def shards(self) -> list[Path]:
        """The shards this store has read, in no order."""
        return list(self._shards)

    @property
    def impaired(self) -> list[Path]:
        """Those of `shards` with an entry that was found damaged, or that are gone."""
        rows = self._table.rows
        return [self._shards[index] for index in np.unique(rows["shard"][rows["bad"]])]

    def __len__(self) -> int:
        """Entries that can be read, copies counted."""
        return int(np.count_nonzero(~self._table.rows["bad"])) + len(self._waiting)

    def __contains__(self, key: object) -> bool:
        """Whether the entry is there. Its numbers are checked only by `get`."""
        assert isinstance(key, bytes)
        return key in self._waiting or bool(self._places(key))

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The entry's tensors, bit for bit as they were put, or None: it is missing, or was damaged.

        A damaged entry is set aside, and told in `notices`; whoever needs it makes it anew.
        """
        if key in self._waiting:
            return {name: tensor.clone() for name, tensor in self._waiting[key].items()}
        found = self._first_whole(key)
        if found is None and self.refresh():  # another process may have packed the shard anew
            found = self._first_whole(key)
        return found

    def put(self, key: bytes, tensors: Tensors) -> bool:
        """Add an entry of one or more tensors of one dtype: fp32, fp16 or bf16. True if that filled a shard.

        Raises DataError if the shard cannot be written.
        """
        if key in self:
            return False
        if not self._waiting:
            self._since = time.monotonic()
        # Copies: rows of a batch would keep all of it in memory, and safetensors refuses tensors that share theirs.
        self._waiting[key] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._waiting_bytes += sum(tensor.nbytes for tensor in tensors.values())
        most, longest = self._limits
        if self._waiting_bytes < most and time.monotonic() - self._since < longest:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Write what waits as a shard, whole and synced, and see what other processes have written."""
        if not self._waiting:
            return
        try:
            write_shard(self.shard_folder, self._waiting)
        except OSError as error:
            raise DataError(
                f"The cache {self.folder} cannot be written: {error.strerror or error}. Make room, or name another "
                "folder as data.cache_dir."
            ) from error
        self._waiting, self._waiting_bytes = {}, 0
        self.refresh()

    def refresh(self) -> bool:
        """Read the shards that were written since; whether there were any. Costs a listing of the folder."""
        known = self._refused.union(path.name for path in self._shards)
        present = sorted(path for path in self.shard_folder.glob("*.safetensors") if SHARD_NAME.fullmatch(path.name))
        new = [path for path in present if path.name not in known]
        if not new:
            return False
        notes = {path.stem for path in self.damaged_folder.glob("*.txt")}
        parts = [self._rows(path, notes) for path in new]
        self._table.add([part for part in parts if part is not None])
        return True

    def read(self, row: int) -> dict[str, Tensor] | None:
        """The tensors of one of `rows`, or None: its shard is gone, or it is damaged and now set aside."""
        path, entry = self.entry(row)
        try:
            return read_entry(path, entry)
        except FileNotFoundError:  # packed anew or pruned by another process
            self._table.rows["bad"][row] = True
        except DamagedError as error:
            self._table.rows["bad"][row] = True
            self._note_damage(path, entry, str(error))
        return None

    def rows(self) -> list[int]:
        """Every entry that can be read, copies too, as they lie on disk. Numbers hold until shards are added."""
        rows = self._table.rows
        order = np.lexsort((rows["begin"], rows["shard"]))
        return order[~rows["bad"][order]].tolist()

    def entry(self, row: int) -> tuple[Path, Entry]:
        """Where one of `rows` lies: its shard, and what is where in it."""
        key, checksum, begin, shard, layout, _ = self._table.rows[row]
        return self._shards[shard], Entry(key.tobytes(), int(begin), checksum.tobytes(), self._layouts[layout])

    def __enter__(self) -> CacheStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write what waits, after an error too: entries are whole whatever stopped the work."""
        self.flush()

    def __getstate__(self) -> dict[str, Any]:
        assert not self._waiting, "flush a store before handing it to another process"
        return self.__dict__

    def _places(self, key: bytes) -> list[int]:
        return [row for row in self._table.find(key) if not self._table.rows["bad"][row]]

    def _first_whole(self, key: bytes) -> dict[str, Tensor] | None:
        return next((found for row in self._places(key) if (found := self.read(row)) is not None), None)

    def _rows(self, path: Path, notes: set[str]) -> Rows | None:
        """A shard's rows; None if it is damaged, or gone by now."""
        try:
            entries = read_shard(path)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            self._set_aside(path, str(error))
            return None
        rows = new_rows(_ROW, [entry.key for entry in entries])
        rows["checksum"] = np.frombuffer(b"".join(entry.checksum for entry in entries), _ROW["checksum"])
        rows["begin"] = [entry.begin for entry in entries]
        rows["layout"] = [self._layout(entry.layout) for entry in entries]
        rows["shard"] = len(self._shards)
        if notes:
            rows["bad"] = [note_name(path, entry.key) in notes for entry in entries]
        self._shards.append(path)
        return rows

    def _layout(self, layout: tuple[Part, ...]) -> int:
        """Number of a layout; there are as many as picture sizes."""
        if layout not in self._layouts:
            self._layouts.append(layout)
        return self._layouts.index(layout)

    def _note_damage(self, path: Path, entry: Entry, reason: str) -> None:
        self.notices.append(f"{reason}; noted in {self.damaged_folder}")
        try:
            write_text(self.damaged_folder / f"{note_name(path, entry.key)}.txt", reason + "\n")
        except OSError as error:  # a folder that others keep: this process alone knows, and says so
            self.notices.append(f"{self.damaged_folder} cannot be written ({error.strerror})")

    def _set_aside(self, path: Path, reason: str) -> None:
        self.notices.append(f"{reason}; moved to {self.damaged_folder}")
        try:
            self.damaged_folder.mkdir(parents=True, exist_ok=True)
            path.rename(self.damaged_folder / path.name)
        except FileNotFoundError:
            pass  # another process has moved it
        except OSError as error:
            self._refused.add(path.name)
            self.notices.append(f"{path} cannot be moved ({error.strerror}); it is left out")


def note_name(shard: Path, key: bytes) -> str:
    """Name, without its ending, of the note on a damaged entry of a shard."""
    return f"{shard.stem}-{key.hex()}"
