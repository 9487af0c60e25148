"""A run's folder: its logs, its model, its lock, and the signals that end it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..errors import InputError
from .data import TOKENIZER_FILE
from .state import PARTIAL, Checkpoints, lock, replace_file

if TYPE_CHECKING:
    from rich.console import Console

RECIPE_FILE, LOCK_FILE = "recipe.json", "lock"
CHECKPOINTS = "checkpoints"
LOGS = ("metrics.jsonl", "timing.jsonl")


class RunFolder:
    """Where a run leaves what it made: `metrics.jsonl` (no clock in it), `timing.jsonl`, `recipe.json`, `model/`,
    `checkpoints/`. While it is open no other process can open it; a killed process does not hold it.

    Args:
        path: a folder that does not exist or is empty.
        recipe: the run's settings, for `recipe.json`.

    Raises:
        InputError: the folder exists and is not empty, another training is in it, or it cannot be made.
    """

    def __init__(self, path: str | Path, recipe: Mapping[str, Any]) -> None:
        self.path = self.check(path)
        self._was_there = self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            self.write_recipe(recipe)
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror or error}") from None

    @classmethod
    def reopen(cls, path: str | Path) -> Self:
        """The folder of a run that is to go on; what an interrupted write left is removed.

        Raises:
            InputError: no run there, or another training is in it.
        """
        folder = cls.__new__(cls)
        folder.path = Path(path)
        read_recipe(folder.path)
        try:
            folder._lock = _lock(folder.path)
            folder.checkpoints().clean()
            for place in (folder.path, folder.path / "model"):
                for left in [*place.glob(f"{PARTIAL}*"), *place.glob(".save-*")]:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError as error:
            raise InputError(f"cannot write to {folder.path}: {error.strerror or error}") from None
        return folder

    @staticmethod
    def check(path: str | Path) -> Path:
        """The path, if a run may be put there; nothing is made."""
        path = Path(path)
        try:
            if path.exists() and any(entry.name != LOCK_FILE for entry in path.iterdir()):
                raise InputError(f"{path} already holds a run; name another folder or remove it")
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others open the folder."""
        self._lock.close()

    def discard(self) -> None:
        """Close a new folder and leave nothing of it, for a run that did not begin."""
        self.close()
        shutil.rmtree(self.path)
        if self._was_there:
            self.path.mkdir()

    def checkpoints(self, keep: int = 2) -> Checkpoints:
        return Checkpoints(self.path / CHECKPOINTS, keep)

    def log(self, **values: Any) -> None:
        self._append(LOGS[0], values)

    def clock(self, **values: Any) -> None:
        self._append(LOGS[1], values)

    def lengths(self) -> dict[str, int]:
        """Bytes of each log, all of them on the disk."""
        found = {}
        for name in LOGS:
            if (self.path / name).exists():
                with open(self.path / name, "rb") as file:
                    os.fsync(file.fileno())
            found[name] = (self.path / name).stat().st_size if (self.path / name).exists() else 0
        return found

    def truncate(self, lengths: Mapping[str, int]) -> list[str]:
        """Cut the logs back to what `lengths` said; returns a sentence for each that is shorter already."""
        short = []
        for name in LOGS:
            path, wanted = self.path / name, lengths.get(name, 0)
            size = path.stat().st_size if path.exists() else 0
            if size < wanted:
                short.append(f"{path} has lost {wanted - size} bytes since the checkpoint was made")
            elif size > wanted:
                os.truncate(path, wanted)
        return short

    def save(self, model: Any, tokenizer: Any = None, name: str = "model") -> Path:
        """Write a checkpoint that `LoopMDM.from_pretrained` reads at every moment, also in the middle of a save.

        Raises:
            OSError: the disk is full or the folder cannot be written; a former checkpoint still reads.
        """
        folder = self.path / name
        if tokenizer is not None:  # first: config.json makes it a checkpoint
            self.save_tokenizer(tokenizer, name)
        model.save_pretrained(folder)
        return folder

    def save_tokenizer(self, tokenizer: Any, name: str = "model") -> None:
        """Write it where the model will lie, unless it is there already; a run that goes on takes it from there."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        if not (folder / TOKENIZER_FILE).exists():
            replace_file(folder / TOKENIZER_FILE, tokenizer.to_str())

    def write_recipe(self, recipe: Mapping[str, Any]) -> None:
        replace_file(self.path / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")

    def write_results(self, results: Mapping[str, Any]) -> None:
        (self.path / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a run's folder.

    Raises:
        InputError: there is no run in it.
    """
    try:
        settings = json.loads((path / RECIPE_FILE).read_text())
    except OSError:
        raise InputError(f"{path} holds no run: there is no {RECIPE_FILE} in it") from None
    except ValueError as error:
        raise InputError(f"{path / RECIPE_FILE} cannot be read as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path / RECIPE_FILE} holds no settings of a run")
    return settings


def _lock(path: Path) -> Any:
    """An open file that holds the folder's lock until it is closed or the process ends, however it ends."""
    file = open(path / LOCK_FILE, "a+")  # noqa: SIM115
    if not lock(file):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise InputError(f"another training is writing to {path} (process {holder}); wait for it or end it")
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


class Stop:
    """SIGTERM, SIGHUP and the first Ctrl-C ask training to end after the step in progress; a further Ctrl-C ends it at
    once.

    A context manager; outside the main thread, and for a signal that the process ignores, it changes nothing.

    Args:
        console: what the run prints on; a hang-up silences it.

    Attributes:
        signal: the number of the signal that asked, or None.
    """

    def __init__(self, console: Console) -> None:
        self.console, self.signal = console, None
        self._former: dict[int, Any] = {}

    signal: int | None

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            self.console.quiet = True  # writing to a terminal that is gone would end the run before it has saved
        if self.signal is None:
            self.signal = number
            with suppress(RuntimeError):  # it came while a line was being written
                self.console.print("Stopping after this step; Ctrl-C stops at once.")
