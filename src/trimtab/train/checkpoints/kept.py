"""Which checkpoints of a run are there: the newest, the best, and those that are dropped."""

import json
import logging
import os
from pathlib import Path

from trimtab.errors import CheckpointError
from trimtab.train.checkpoints.files import CHECKPOINTS, DamagedError, in_order, read_content, remove, step_of, verify

logger = logging.getLogger("trimtab")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder; damaged ones are skipped, with one warning.

    Raises:
        CheckpointError: a checkpoint cannot be read at all, which says nothing of what is in it.
    """
    skipped = []
    for path in reversed(in_order(folder / CHECKPOINTS)):
        try:
            verify(path)
        except DamagedError as error:
            skipped.append(str(error))
            continue
        if skipped:
            logger.warning("%s. Going on from %s", "; ".join(skipped), path.name)
        return path
    if skipped:
        logger.warning("%s. There is no whole checkpoint", "; ".join(skipped))
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The best whole checkpoint in a run's folder; None when none of those that are there was ever the best."""
    for path in reversed(in_order(folder / CHECKPOINTS)):
        try:
            if read_content(path)["best"]:
                verify(path)
                return path
        except DamagedError:
            continue
    return None


def drop_others(checkpoints: Path, step: int, keep: int) -> None:
    """Drop what is neither among the last nor the best, and say in best.json which that is."""
    found = in_order(checkpoints)
    # Later ones than this, the newest that is whole, were damaged, and the run has gone on from before them.
    past = [path for path in found if (step_of(path) or 0) <= step]
    best, content = None, {}
    for path in past:
        try:
            said = read_content(path)
        except CheckpointError:
            continue
        if said["best"]:
            best, content = path, said
    for path in found:
        if path not in past[-keep:] and path != best:
            remove(path)
    if best is None:
        return
    metrics = content["facts"].get("metrics", {})
    text = json.dumps({"step": step_of(best), "metrics": metrics}) + "\n"
    pointer = checkpoints / "best.json"
    if not pointer.is_file() or pointer.read_text() != text:
        aside = checkpoints / "best.json.part"
        aside.write_text(text)
        os.replace(aside, pointer)
