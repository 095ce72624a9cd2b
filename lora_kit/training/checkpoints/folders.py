"""The folder of checkpoints: each put in place in one step, checked by its manifest, and removed when old."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_kit.files import sync_folder, sync_tree

FORMAT = 2
"""Version of what a checkpoint holds."""
MANIFEST = "manifest.json"
BEST = "best"
DAMAGED = "damaged-"
STEP_FOLDER = re.compile(r"step-(\d{6,})")


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder` by their names, oldest first; `damage` says which are whole."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := STEP_FOLDER.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that its manifest agrees with."""
    return next((path for path in reversed(find_checkpoints(folder)) if not damage(path)), None)


def damage(path: Path) -> str:
    """Why the checkpoint at `path` is not whole; empty if every file has the bytes that were written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, and this version reads {FORMAT}"
    return next((said for name, facts in files.items() if (said := _file_damage(path / name, facts))), "")


def write_manifest(folder: Path) -> None:
    """Sizes and sha256 of every file in `folder`, into manifest.json."""
    files = {path.name: _facts(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")


@contextmanager
def temporary_folder(path: Path) -> Generator[Path]:
    """A hidden folder beside `path` to write to; gone afterwards unless it was put in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give the finished folder its name, once it is wholly on disk.

    One that has the name already (the same step again, after a resume) is set aside for that moment; `tidy` puts it
    back if the process dies in between.
    """
    sync_tree(temporary)
    aside = path.with_name(f".{path.name}.aside")
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    temporary.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what a killed process left half done."""
    for aside in folder.glob(".step-*.aside"):
        path = folder / aside.name[1 : -len(".aside")]
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)
    for left in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.removed")]:
        shutil.rmtree(left)
    for mark in folder.glob(f".{BEST}.*.tmp"):  # a link, or a file that stands for one
        mark.unlink()


def set_damaged_aside(folder: Path) -> list[str]:
    """Rename the newest checkpoints that are not whole, down to the first whole one, to damaged-step-…, and say so."""
    said: list[str] = []
    for path in reversed(find_checkpoints(folder)):
        reason = damage(path)
        if not reason:
            break
        other = path.with_name(DAMAGED + path.name)
        if other.exists():
            shutil.rmtree(other)  # the same step, damaged before
        path.rename(other)
        said.append(f"checkpoint {path.name} is damaged ({reason}); set aside as {other.name}.")
    return said


def remove_old(folder: Path, step: int, keep: int) -> None:
    """Leave the newest `keep` checkpoints of the steps up to `step`, and the best."""
    best = best_checkpoint(folder)
    mine = [path for path in find_checkpoints(folder) if int(path.name.removeprefix("step-")) <= step]
    for path in mine[:-keep]:
        if best is None or path.name != best.name:
            # Renamed first: half a checkpoint must not have a checkpoint's name.
            gone = path.with_name(f".{path.name}.removed")
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
            shutil.rmtree(gone)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `best` stands for."""
    mark = folder / BEST
    if mark.is_symlink():
        found = folder / mark.readlink()
    elif mark.is_file():
        found = folder / mark.read_text(encoding="utf-8").strip()
    else:
        return None
    return found if found.is_dir() else None


def mark_best(folder: Path, name: str | None) -> None:
    """Let `best` be a link to the checkpoint `name` (where links cannot be made, a file that holds the name), or
    remove it."""
    mark, temporary = folder / BEST, folder / f".{BEST}.{os.getpid()}.tmp"
    if name is None:
        mark.unlink(missing_ok=True)
        return
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name, target_is_directory=True)
    except OSError:
        temporary.write_text(name + "\n", encoding="utf-8")
    temporary.replace(mark)
    sync_folder(folder)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _file_damage(path: Path, facts: dict[str, Any]) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != facts["bytes"]:
        return f"{path.name} has {size} bytes, {facts['bytes']} were written"
    return "" if _facts(path) == facts else f"{path.name} is not what was written: its sha256 differs"
