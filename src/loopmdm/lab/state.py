"""The state of a run on disk: checkpoints that appear whole or not at all, and the newest one that still reads.

    DIR/checkpoints/step-000120/state.pt        everything that training needs to go on exactly
                                manifest.json   step, and size and SHA-256 of each file

A checkpoint is written into a hidden folder, made durable and renamed; the rename is what makes it count. It is
renamed away again before it is removed. So a kill at any moment leaves whole checkpoints and hidden leftovers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import InputError
from ..model.checkpoint import sync_folder

STATE_FILE, MANIFEST_FILE = "state.pt", "manifest.json"
NAME = re.compile(r"step-(\d{6,})")
PARTIAL = ".partial-"
"""How the names begin of what is being written or removed."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made by the first save.
        keep: how many stay, at least 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"keep is {keep}; at least one checkpoint must stay")
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove all but the `keep` newest up to it and any of later steps.

        Args:
            state: tensors, numbers, strings, lists and dicts: what `torch.load(weights_only=True)` reads.

        Raises:
            OSError: the disk is full or the folder cannot be written; checkpoints that were there still are.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, target = self.folder / f"{PARTIAL}{step:06d}", self.path(step)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            entry = _write_state(partial / STATE_FILE, state)
            _write(partial / MANIFEST_FILE, json.dumps({"step": step, "files": {STATE_FILE: entry}}, indent=2))
            sync_folder(partial)
            if target.exists():  # a damaged one: training has come to this step again
                self._remove(target)
            os.rename(partial, target)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(self.folder)
        kept = [s for s in self.steps() if s <= step][-self.keep :]
        for other in self.steps():
            if other not in kept:
                self._remove(self.path(other))
        return target

    def newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """State of the newest checkpoint that reads, and a sentence for each newer one that does not.

        None if there is no checkpoint at all.

        Raises:
            InputError: there are some, and all are damaged.
        """
        complaints: list[str] = []
        for step in reversed(self.steps()):
            try:
                return read(self.path(step)), complaints
            except InputError as error:
                complaints.append(str(error))
        if complaints:
            raise InputError(f"no checkpoint in {self.folder} can be read: {'; '.join(complaints)}")
        return None, complaints

    def clean(self) -> None:
        """Remove what an interrupted save or removal left."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(path)

    def _remove(self, path: Path) -> None:
        going = self.folder / f"{PARTIAL}gone-{path.name}"
        shutil.rmtree(going, ignore_errors=True)
        os.rename(path, going)
        shutil.rmtree(going)


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint's folder, on the CPU.

    Raises:
        InputError: a file is missing, or not what was written.
    """
    try:
        entry = json.loads((path / MANIFEST_FILE).read_text())["files"][STATE_FILE]
        with open(path / STATE_FILE, "rb") as file:
            if os.fstat(file.fileno()).st_size != entry["bytes"]:
                raise InputError(f"{path} is damaged ({STATE_FILE} is not as long as it was)")
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise InputError(f"{path} is damaged ({STATE_FILE} has changed)")
            file.seek(0)
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except OSError as error:
        raise InputError(f"{path} is damaged ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({MANIFEST_FILE} cannot be read)") from None


def replace_file(path: Path, data: str) -> None:
    """Write a small text file so that at every moment either the old one or the new one is there, whole."""
    partial = path.parent / f"{PARTIAL}{path.name}"
    _write(partial, data)
    os.replace(partial, path)
    sync_folder(path.parent)


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends, however it ends; False if another process has it.

    A system or a file system without locks gives it to everyone.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _write(path: Path, data: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(data)
        _sync(file)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Hashed:
    """A file that hashes what is written to it, and keeps the error that torch's writer would replace by its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            count = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        self.bytes += count
        return count

    def flush(self) -> None:
        self.file.flush()


def _write_state(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """torch.save, made durable; returns the file's entry in the manifest."""
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        try:
            torch.save(dict(state), hashed)  # type: ignore[arg-type]
        except RuntimeError:
            if hashed.error is not None:
                raise hashed.error from None
            raise
        _sync(file)
    return {"bytes": hashed.bytes, "sha256": hashed.hash.hexdigest()}
