"""Recordings in files: FLAC, WAV and what else libsndfile reads."""

import os
import re
from pathlib import Path

import numpy as np

from trimtab.errors import DataError
from trimtab.tasks.speech.features import SHIFT_MS, WINDOW_MS, Features, Samples, log_mel, normalized, num_frames

SUFFIXES = (".flac", ".wav", ".ogg")
_LOUDEST = 1e6  # beyond what any scale of whole numbers gives, and far below where energies are infinite
_UNKNOWN_SIZE = 0x7F000000  # bytes


class AudioError(DataError):
    """A recording that cannot be used; `kind` is the same for all that are wrong alike."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_audio(path: str | Path, sample_rate: int) -> Samples:
    """The samples of a recording, (N,), from -1 to 1.

    Nothing is resampled or mixed down: that is for tools made for it, such as sox and ffmpeg, to do well and once.

    Args:
        path: of the file.
        sample_rate: that it must have, Hz.

    Raises:
        AudioError: it is missing or damaged, a RIFF WAV that is cut off, of another sample rate, of several channels,
            too short for one frame, or of samples that are no recording's.
    """
    import soundfile

    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # of any name that a file may have
            samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
            told = file.extra_info
    except (OSError, RuntimeError) as error:  # soundfile's own errors are RuntimeErrors
        reason = getattr(error, "error_string", str(error))
        if not Path(path).exists():
            reason = "there is no such file"
        elif Path(path).is_dir():
            reason = "it is a folder, expected a file"
        raise AudioError("unreadable", f"{path} cannot be read: {reason}") from None
    if missing := _bytes_cut_off(told):
        raise AudioError(
            "cut off", f"{path} is cut off: its header tells of {missing:,} bytes more than there are; copy it again"
        )
    if rate != sample_rate:
        raise wrong_rate(str(path), rate, sample_rate)
    if samples.shape[1] != 1:
        raise AudioError(
            "several channels",
            f"{path} has {samples.shape[1]} channels, expected one: mix or choose, for example with "
            f"`sox {Path(path).name} -c 1 out.wav`",
        )
    if not num_frames(len(samples), sample_rate):
        short = f"is shorter than one window of {WINDOW_MS} ms (every {SHIFT_MS} ms)"
        raise AudioError("too short", f"{path} {short if len(samples) else 'has no sample that can be read'}")
    mono = samples[:, 0]
    if not np.isfinite(mono).all():
        raise AudioError("unreadable", f"{path} has samples that are not finite numbers")
    if np.abs(mono).max() > _LOUDEST:
        raise AudioError(
            "unreadable", f"{path} has samples of {np.abs(mono).max():.0e}, and those of recordings are from -1 to 1"
        )
    return mono


def _bytes_cut_off(told: str) -> int:
    """How many bytes of samples a WAV file lacks, by what libsndfile tells of it.

    Files that were written into a pipe tell of the largest number there is, since nobody knew theirs.
    """
    found = re.search(r"^\s*data : (\d+) \(should be (\d+)\)", told, re.MULTILINE)
    if found is None:
        return 0
    header, there = map(int, found.groups())
    return header - there if there + 1 < header < _UNKNOWN_SIZE else 0  # some leave out the last byte of an odd number


def wrong_rate(name: str, rate: int, expected: int) -> AudioError:
    """The error for a recording of another sample rate, Hz."""
    return AudioError(
        "wrong sample rate",
        f"{name} has {rate:,} samples a second, expected {expected:,}: convert it, for example with "
        f"`sox {Path(name).name} -r {expected} out.wav`",
    )


def is_silent(samples: Samples) -> bool:
    """Whether every sample is the same: 0, or the offset of a recorder that heard nothing."""
    return bool((samples == samples[0]).all())


def audio_features(samples: Samples, sample_rate: int, bins: int) -> Features:
    """The features that a model of audio takes: log-mel energies, normalised over the utterance, (T, bins)."""
    return normalized(log_mel(samples, sample_rate, bins))
