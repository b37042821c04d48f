"""Folders of recordings, as LibriSpeech is kept: SPLIT/**/*.trans.txt, with the recordings beside each.

A line of a .trans.txt is `NAME TRANSCRIPT`; the recording is NAME.flac, NAME.wav or NAME.ogg (or NAME.WAV ...) in the
same folder.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from trimtab.errors import DataError
from trimtab.tasks.data.prepare import Arrays, prepared
from trimtab.tasks.notices import warn
from trimtab.tasks.speech.audio_files import SUFFIXES, AudioError, audio_features, is_silent, read_audio
from trimtab.tasks.speech.features import Features, num_frames
from trimtab.tasks.speech.sets.speech_data import SpeechData, first_few, one_spaced
from trimtab.tasks.text.lines import lines_of, read_text

_FORMAT = "recordings 3"  # changes with what is found out about a recording
_PATIENCE = 24 * 3600.0  # seconds; a large folder takes its time, and other processes wait for the first
SILENT, EMPTY = "silent recordings", "empty transcripts"
OTHER = "files of other kinds"


@dataclass(frozen=True)
class _Recording:
    name: str
    """From the folder on, without suffix."""
    path: Path
    text: str
    split: int


def load_folder(
    name: str, folder: Path, splits: Sequence[str], sample_rate: int, bins: int, skip_faulty: bool
) -> SpeechData:
    """Load a folder of recordings with transcripts. Features are made as they are needed.

    Every recording is read once, the first time. A fault is a recording without transcript, a transcript without
    recording, a recording whose name another has, and one that cannot be read or is of another sample rate, of several
    channels or too short. Silent recordings (every sample is the same) and empty transcripts are no faults: they are
    counted, and used. Files of other kinds are counted, and not used; hidden ones are not looked at.

    Args:
        name: of the set.
        folder: holds the folders of the splits.
        splits: names of the folders for training, validation and test.
        sample_rate: of the recordings, Hz.
        bins: mel bins.
        skip_faulty: leave faults out, with a warning that counts and names them.

    Raises:
        DataError: a split is missing or empty, a transcript is given twice, or there are faults.
    """
    found, faults, others = _listed(folder, splits)
    samples, silent, why = _looked_at(folder, found, sample_rate)
    faults += [(kind, message) for kind, message in why if kind]
    if faults and not skip_faulty:
        raise DataError(f"{folder} has {_told(faults)}. Mend or remove them, or leave them out with --skip-faulty")
    good = [i for i, (kind, _) in enumerate(why) if not kind]
    recordings = [found[i] for i in good]
    counts = Counter(f"left out: {kind}" for kind, _ in faults)
    if faults:
        warn(f"{folder}: left out {_told(faults)}")
    counts[OTHER] = len(others)
    if others:
        warn(f"{folder}: {len(others):,} {OTHER} than {', '.join(SUFFIXES)} and .trans.txt: {first_few(others)}")
    silence = [found[i].name for i in good if silent[i]]
    for what, names in ((SILENT, silence), (EMPTY, [each.name for each in recordings if not each.text])):
        counts[what] = len(names)
        if names:
            warn(f"{folder}: {len(names):,} {what}, used as they are: {first_few(names)}")
    parts = [torch.tensor([i for i, each in enumerate(recordings) if each.split == part]) for part in range(3)]
    for split, part in zip(splits, parts, strict=True):
        if not len(part):
            raise DataError(f"{folder / split} has no recording that can be used")

    def read(indices: Sequence[int]) -> list[Features]:
        return list(_threads().map(lambda i: _features(recordings[i].path, sample_rate, bins), indices))

    return SpeechData(
        name=name,
        in_features=bins,
        names=tuple(recording.name for recording in recordings),
        texts=tuple(recording.text for recording in recordings),
        frames=torch.tensor([num_frames(int(samples[i]), sample_rate) for i in good]),
        read=read,
        train=parts[0].long(),
        validation=parts[1].long(),
        test=parts[2].long(),
        counts={what: count for what, count in counts.items() if count},
    )


def _listed(folder: Path, splits: Sequence[str]) -> tuple[list[_Recording], list[tuple[str, str]], list[str]]:
    """The recordings with transcripts of all splits, in the order of their names; what is wrong; and other files."""
    found, faults, others = [], [], []
    for number, split in enumerate(splits):
        if not (folder / split).is_dir():
            raise DataError(f"{folder / split} is missing; a speech folder has {', '.join(splits)} (--splits A B C)")
        transcripts = sorted((folder / split).rglob("*.trans.txt"))
        if not transcripts:
            raise DataError(f"{folder / split} has no *.trans.txt with lines `NAME TRANSCRIPT`")
        audio: dict[Path, Path] = {}
        for path in sorted((folder / split).rglob("*")):
            name, stem = path.relative_to(folder).as_posix(), path.with_suffix("")
            if path.name.startswith(".") or path.is_dir() or path.name.endswith(".trans.txt"):
                continue
            if path.suffix.lower() not in SUFFIXES:
                others.append(name)
            elif stem in audio:
                faults.append(("second recording of a name", f"{name} beside {audio[stem].name}"))
            else:
                audio[stem] = path
        told = set[Path]()
        for path in transcripts:
            for line in filter(str.strip, lines_of(read_text(path))):
                own, text = [*line.split(maxsplit=1), ""][:2]
                stem = path.parent / own
                if stem in told:
                    raise DataError(f"{path} tells the transcript of {own} a second time")
                told.add(stem)
                name = stem.relative_to(folder).as_posix()
                if stem in audio:
                    found.append(_Recording(name, audio[stem], one_spaced(text), number))
                else:
                    faults.append(("transcript without recording", f"{name}: there is no {own}.flac, .wav or .ogg"))
        faults += [
            ("recording without transcript", f"{audio[stem].relative_to(folder)} has no transcript")
            for stem in sorted(audio.keys() - told)
        ]
    return found, faults, others


def _looked_at(
    folder: Path, recordings: list[_Recording], sample_rate: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Of each recording: its samples (N,), whether it is silent (N,), and what is wrong with it, ("", "") if nothing.

    It is found out once, and again when a name, a size or a time of last change is another.
    """
    stats = [(str(each.path), each.path.stat().st_size, each.path.stat().st_mtime_ns) for each in recordings]
    fingerprint = hashlib.sha256(json.dumps(stats).encode()).hexdigest()

    def look(recording: _Recording) -> tuple[int, bool, str, str]:
        try:
            samples = read_audio(recording.path, sample_rate)
        except AudioError as error:
            return 0, False, error.kind, str(error)
        return len(samples), is_silent(samples), "", ""

    def make() -> Arrays:
        samples, silent, kinds, messages = zip(*_threads().map(look, recordings), strict=True)
        why = json.dumps([kinds, messages]).encode()
        return {
            "samples": np.array(samples, np.int64),
            "silent": np.array(silent),
            "why": np.frombuffer(why, np.uint8),
        }

    name = f"{folder.resolve().name[:60]}-recordings"
    arrays = prepared(name, [_FORMAT, fingerprint, str(sample_rate)], make, _PATIENCE)
    kinds, messages = json.loads(arrays["why"].tobytes())
    return arrays["samples"], arrays["silent"], list(zip(kinds, messages, strict=True))


def _features(path: Path, sample_rate: int, bins: int) -> Features:
    try:
        return audio_features(read_audio(path, sample_rate), sample_rate, bins)
    except AudioError as error:
        raise DataError(f"{error} (it was whole when the folder was looked at)") from None


def _told(faults: list[tuple[str, str]]) -> str:
    kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(Counter(kind for kind, _ in faults).items()))
    more = f"; and {len(faults) - 3:,} more" if len(faults) > 3 else ""
    return f"{kinds}: {'; '.join(message for _, message in faults[:3])}{more}"


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="recordings")
