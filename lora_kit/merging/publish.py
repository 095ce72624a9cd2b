"""Put a merged base in its place: whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_kit.errors import RecipeError
from lora_kit.files import sync_folder, sync_tree, write_atomically, write_text
from lora_kit.merging.base import Base
from lora_kit.merging.report import MergeReport
from lora_kit.merging.schedule import ScheduleChange
from lora_kit.merging.stored import WeightFile, open_safetensors
from lora_kit.merging.stream import Rewrite, write_rewrite
from lora_kit.merging.weights import ComponentFiles, written_index, written_name

Inspect = Callable[[list[WeightFile | None]], MergeReport]
"""What is written, read back, for each of the base's files (None: copied) → the report; raising stops the merge."""


def check_out(base: Path, out: Path) -> None:
    """Raise RecipeError if `out` cannot take the merged base; before any work is done."""
    if out.resolve() == base.resolve() or base.resolve() in out.resolve().parents:
        raise RecipeError(f"{out}: is the base or inside it; name a new place for the merged model")
    if base.is_dir():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RecipeError(f"{out}: exists already and is not an empty folder; name a new one or remove it first")
    elif out.exists():
        raise RecipeError(f"{out}: exists already; name a new file or remove it first")
    elif base.is_file() and out.suffix != ".safetensors":
        raise RecipeError(
            f"{out}: the base is a single file, so this must end in .safetensors, which is what is written"
        )
    if not out.absolute().parent.is_dir():
        raise RecipeError(f"{out}: the folder {out.absolute().parent} does not exist; make it first")


def write_merged(
    base: Base, rewrites: Sequence[Rewrite | None], out: Path, inspect: Inspect, schedule: ScheduleChange
) -> MergeReport:
    """Write the base's files anew under temporary names, let `inspect` judge them, then give them their place.

    Raises RecipeError if the disk refuses. Whatever is raised, nothing is left behind.
    """
    try:
        if base.is_folder:
            return _write_folder(base, rewrites, out, inspect, schedule)
        return _write_file(rewrites, out, inspect)
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written ({error}). Nothing was left behind.") from error


def remove(out: Path) -> None:
    """Take back what was written."""
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()


def _write_file(rewrites: Sequence[Rewrite | None], out: Path, inspect: Inspect) -> MergeReport:
    reports: list[MergeReport] = []
    (rewrite,) = rewrites
    assert rewrite is not None, "a single file that does not change was refused before"

    def write(temporary: Path) -> None:
        write_rewrite(rewrite, temporary)
        reports.append(inspect([open_safetensors(temporary)]))

    write_atomically(out, write)
    return reports[0]


def _write_folder(
    base: Base, rewrites: Sequence[Rewrite | None], out: Path, inspect: Inspect, schedule: ScheduleChange
) -> MergeReport:
    temporary = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _copy_rest(base, rewrites, temporary)
        schedule.write(temporary)
        written: list[WeightFile | None] = []
        for rewrite in rewrites:
            if rewrite is None:
                written.append(None)
                continue
            path = temporary / rewrite.source.path.relative_to(base.path)
            path = path.with_name(written_name(path.name))
            write_rewrite(rewrite, path)
            written.append(open_safetensors(path))
        _write_indices(base, rewrites, temporary)
        report = inspect(written)
        sync_tree(temporary)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        sync_folder(out.absolute().parent)
        return report
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_rest(base: Base, rewrites: Sequence[Rewrite | None], temporary: Path) -> None:
    """Copy all but the weights that are written anew. Links are followed: a hub snapshot is made of them.

    Of a component that changes, the other variants and formats stay behind: they would still be the old weights.
    """
    changed = {rewrite.source.path.parent for rewrite in rewrites if rewrite}
    kept = {file.path for file, rewrite in zip(base.files, rewrites, strict=True) if rewrite is None}
    left_out = {path for files in _changed(base, changed) for path in files.all_weights if path not in kept}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder) / name in left_out}

    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(base.path, temporary, ignore=ignore)


def _write_indices(base: Base, rewrites: Sequence[Rewrite | None], temporary: Path) -> None:
    """The index of every sharded component that changes."""
    changed = {rewrite.source.path.parent for rewrite in rewrites if rewrite}
    for files in _changed(base, changed):
        total = sum(
            tensor.nbytes // tensor.dtype.itemsize * (rewrite.dtype_of(tensor) if rewrite else tensor.dtype).itemsize
            for file, rewrite in zip(base.files, rewrites, strict=True)
            if file.path.parent == files.folder
            for tensor in file.tensors.values()
        )
        text = written_index(files, total)
        if text is not None and files.shard_index is not None:
            write_text(temporary / files.folder.name / written_name(files.shard_index.name), text)


def _changed(base: Base, folders: set[Path]) -> list[ComponentFiles]:
    return [files for files in base.components.values() if files.folder in folders]
