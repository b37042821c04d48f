"""What a run folder holds, and whether a run may start or go on there."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import RunFolderError
from trimtab.train.checkpoints import newest_checkpoint
from trimtab.train.progress import Result, read_result
from trimtab.watch.reduce import Ranks
from trimtab.watch.runlog import ARRAYS, STEPS, run_info, to_json

logger = logging.getLogger("trimtab")

RUN, RESULT, ERROR, FILES = "run.json", "result.json", "error.json", "files"
_OURS = {RUN, RESULT, ERROR, STEPS, "heads.json", "checkpoints", "report.html", FILES, *ARRAYS}
_LOCK = ".lock"
# What two runs of one recipe must share to be the same bit for bit.
_EXACT = ("trimtab", "torch", "python", "platform", "machine", "threads", "accelerator", "strategy")


class Found(NamedTuple):
    """What a folder holds of the run that is to be trained there.

    Attributes:
        checkpoint: the newest whole one, to go on from; None to start from the beginning.
        result: of a run that has ended; None of any other.
    """

    checkpoint: Path | None = None
    result: Result | None = None


@contextmanager
def open_folder(folder: Path, run: Mapping[str, Any]) -> Iterator[Found]:
    """Have a folder for one run, which starts or goes on there, and keep other processes out meanwhile.

    Every process of the run must enter it, with the same arguments; the first looks and locks.

    Args:
        folder: is made if it is not there.
        run: what run.json is to say of the run. Its "task" and "recipe" decide whether it is the run that the folder
            holds; where another of its facts, or a version, is another than it was, one warning says so.

    Raises:
        RunFolderError: the folder holds another run, something else, or what is damaged; it cannot be written; or
            another process trains there. Nothing of it was touched.
    """
    ranks, found = Ranks(), Found()
    with _locked(folder, ranks):

        def look() -> Found:
            return _look(folder, json.loads(to_json(run))) if ranks.first else found

        found = ranks.gather(ranks.all_do(look))[0]
        yield found


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write what a task has for the run folder, name to text, into its folder of files; the first process does.

    Raises:
        RunFolderError: they cannot be written; on every process.
    """

    def write() -> None:
        try:
            for name, text in files.items():
                path = folder / FILES / name
                path.parent.mkdir(exist_ok=True)
                aside = path.with_name(f"{name}.part")
                aside.write_text(text, encoding="utf-8")
                os.replace(aside, path)
        except OSError as error:
            raise RunFolderError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error

    Ranks().first_does(write)


def _look(folder: Path, run: dict[str, Any]) -> Found:
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
    if foreign:
        named = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise RunFolderError(f"{folder} holds what no run wrote ({named}): choose a new or empty folder")
    there = _read_info(folder)
    if there is None:  # new, or killed before it had begun
        return Found()
    difference = first_difference({name: there.get(name) for name in ("task", "recipe")}, run)
    if difference is not None:
        name, then, now = difference
        raise RunFolderError(
            f"{folder} holds another run: {name} is {then} there and {now} here. Choose another folder, or go on with "
            f"that run: trimtab train --from {folder} --folder {folder}"
        )
    result = read_result(folder)
    if result is not None:
        return Found(result=result)
    _warn_of_changes(folder, there, run)
    return Found(checkpoint=newest_checkpoint(folder))


def _is_ours(name: str) -> bool:
    # Hidden files are those of systems, which lie anywhere.
    return name.startswith(".") or name.removesuffix(".part") in _OURS


def _read_info(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None where no run has begun."""
    try:
        return dict(json.loads((folder / RUN).read_bytes()))
    except FileNotFoundError:
        log = folder / STEPS
        begun = (folder / RESULT).exists() or (folder / "checkpoints").exists() or (log.exists() and log.stat().st_size)
        if not begun:
            return None
        why = "is missing"
    except (ValueError, TypeError):
        why = "is damaged"
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
    raise RunFolderError(
        f"{folder} holds a run, but its {RUN}, which tells of which recipe it is, {why}: choose another folder"
    )


def first_difference(there: Any, here: Any, name: str = "") -> tuple[str, str, str] | None:
    """The first entry in which two nests of dicts differ: its dotted name without "recipe", and what it is in each."""
    if isinstance(there, dict) and isinstance(here, dict):
        absent = object()
        for key in dict.fromkeys((*there, *here) if name else there):
            inner = key if name in ("", "recipe") else f"{name}.{key}"
            found = first_difference(there.get(key, absent), here.get(key, absent), inner)
            if found is not None:
                return found
        return None
    if there == here and isinstance(there, bool) == isinstance(here, bool):
        return None
    return (name, *("absent" if type(value) is object else str(value) for value in (there, here)))  # type: ignore[return-value]


def _warn_of_changes(folder: Path, there: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    here = {**run_info(1, None), **run}
    changed = [
        f"{name} {there[name]} then, {value} now"
        for name, value in here.items()
        if name in _EXACT and name in there and there[name] != value
    ]
    if changed:
        logger.warning(
            "the run in %s goes on under other conditions (%s): its numbers will be near those of an uninterrupted "
            "run, not the same bit for bit",
            folder,
            "; ".join(changed),
        )


@contextmanager
def _locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Have the folder to ourselves; the lock of a process that was killed is none."""
    held: list[int] = []
    try:
        ranks.first_does(lambda: held.append(_lock(folder)))
        yield
    finally:
        for number in held:
            with suppress(OSError):
                (folder / _LOCK).unlink()  # before it is let go, so that it is never another's that goes
            os.close(number)


def _lock(folder: Path) -> int:
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; a run needs a folder")
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if os.name == "nt":
                return number  # there nobody looks after two processes in one folder
            import fcntl

            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    holder = os.read(number, 200).decode(errors="replace").strip() or "another process"
                    os.close(number)
                    raise RunFolderError(
                        f"{holder} is training into {folder} at this moment: wait for it, or choose another folder"
                    ) from None
                return number  # a file system without locks
            # Whoever had it may have removed it in between: then ours is a file without a name.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(number), os.stat(path)):
                    break
            os.close(number)
        os.truncate(number, 0)
        os.write(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise RunFolderError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    return number
