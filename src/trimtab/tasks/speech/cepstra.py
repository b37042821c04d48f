"""The mel cepstra that AN4 comes as, made from audio: those of CMU Sphinx's front end, with its old cosine transform.

Found out from the recordings of which both the audio and the cepstra are at hand: on all forty the two agree to 2e-5.
"""

from functools import cache

import numpy as np

from trimtab.tasks.speech.features import Features, Samples

SAMPLE_RATE = 16000
NUM_CEPSTRA = 13
_WINDOW, _SHIFT, _PADDED = 410, 160, 512  # samples: 25.625 ms every 10 ms, and what the Fourier transform takes
_FILTERS, _LOWEST_HZ, _HIGHEST_HZ = 40, 130.0, 6800.0
_LEAST = 1e-4  # energy that is added before the logarithm
_EMPHASIS = 0.97


def cepstra(samples: Samples) -> Features:
    """13 mel cepstra for each frame of audio of 16 kHz, (T, 13), not normalised.

    Pre-emphasis, Hamming windows, energies in 40 triangles of one area between 130 and 6,800 Hz whose corners are
    rounded to steps of the Fourier transform, logarithm, cosine transform. The last frame is filled up with zeros.

    Args:
        samples: (N,), from -1 to 1.
    """
    frames = 2 + max(-1, (len(samples) - _WINDOW) // _SHIFT)
    audio = np.zeros(max(len(samples), (frames - 1) * _SHIFT + _WINDOW))
    audio[: len(samples)] = np.asarray(samples, np.float64) * 32768
    emphasised = audio - _EMPHASIS * np.concatenate([[0.0], audio[:-1]])
    windows = np.lib.stride_tricks.sliding_window_view(emphasised, _WINDOW)[::_SHIFT][:frames] * np.hamming(_WINDOW)
    energies = np.abs(np.fft.rfft(windows, _PADDED)) ** 2 @ _filters().T
    return (np.log(energies + _LEAST) @ _cosines().T).astype(np.float32)


@cache
def _filters() -> np.ndarray:
    """(40, 257): how much of each step of the Fourier transform is in each triangle."""
    step = SAMPLE_RATE / _PADDED
    lowest, highest = (2595 * np.log10(1 + frequency / 700) for frequency in (_LOWEST_HZ, _HIGHEST_HZ))
    corners = 700 * (10 ** (np.linspace(lowest, highest, _FILTERS + 2) / 2595) - 1)
    low, middle, high = (np.floor(corners / step + 0.5)[i : i + _FILTERS, None] * step for i in range(3))
    frequencies = np.arange(_PADDED // 2 + 1) * step
    triangles = np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle))
    return triangles.clip(min=0) * 2 / (high - low)


@cache
def _cosines() -> np.ndarray:
    """(13, 40): the first filter counts half, and nothing is scaled to length 1."""
    places = (np.arange(_FILTERS) + 0.5) / _FILTERS
    cosines = np.cos(np.pi * np.arange(NUM_CEPSTRA)[:, None] * places) / _FILTERS
    cosines[:, 0] /= 2
    return cosines
