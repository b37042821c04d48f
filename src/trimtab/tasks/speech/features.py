"""Features of audio: log-mel energies by kaldi-native-fbank, deltas, and normalisation of each utterance."""

from typing import Any

import numpy as np

from trimtab.errors import DataError

Samples = np.ndarray[tuple[int], np.dtype[np.float32]]
"""Audio of one channel, from -1 to 1."""
Features = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""(T, F): frames, features of each."""

WINDOW_MS, SHIFT_MS = 25, 10
_LOWEST_HZ = 20.0  # Kaldi's
_QUIETEST = 1e-5  # standard deviation below which a feature is constant


def num_frames(samples: int, sample_rate: int) -> int:
    """How many frames an utterance of so many samples has: only whole windows count."""
    window, shift = sample_rate * WINDOW_MS // 1000, sample_rate * SHIFT_MS // 1000
    return max(0, 1 + (samples - window) // shift)


def log_mel(samples: Samples, sample_rate: int, bins: int) -> Features:
    """Logarithms of the energies in mel bins, as Kaldi makes them.

    Windows of 25 ms every 10 ms, whole ones only; of each the mean is taken out, it is pre-emphasised by 0.97, weighed
    with Kaldi's "povey" window and padded to a power of two; triangular bins on the mel scale between 20 Hz and half
    the sample rate; energies of samples on the scale of 16-bit audio, at least 1.2e-7. No dither: the same audio gives
    the same features.

    Args:
        samples: (N,), from -1 to 1.
        sample_rate: in Hz.
        bins: number F of mel bins.

    Returns:
        (T, F), not normalised.

    Raises:
        DataError: there are so many bins that some have nothing in them.
    """
    import kaldi_native_fbank

    options: Any = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = sample_rate
    options.frame_opts.frame_length_ms = WINDOW_MS
    options.frame_opts.frame_shift_ms = SHIFT_MS
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "povey"
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = bins
    options.mel_opts.low_freq = _LOWEST_HZ
    options.use_energy = False
    most = most_bins(sample_rate)
    if bins > most:
        raise DataError(f"audio of {sample_rate:,} Hz has no more than {most} mel bins; got {bins}")
    fbank: Any = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(sample_rate, np.asarray(samples, np.float32) * np.float32(32768))
    fbank.input_finished()
    frames = [fbank.get_frame(i) for i in range(fbank.num_frames_ready)]
    return np.array(frames, np.float32).reshape(-1, bins)


def most_bins(sample_rate: int) -> int:
    """With how many mel bins the narrowest, the first, is still one step of the Fourier transform wide."""
    step = sample_rate / (1 << (sample_rate * WINDOW_MS // 1000 - 1).bit_length())  # Hz
    low, high, a_step_up = _mel(_LOWEST_HZ), _mel(sample_rate / 2), _mel(_LOWEST_HZ + step)
    return int(2 * (high - low) / (a_step_up - low)) - 1  # neighbours overlap by half


def with_deltas(features: Features) -> Features:
    """Features, and their first and second time derivatives beside them, (T, F) -> (T, 3 F).

    The derivative is the slope of a line through five frames; the first and last frame stand for those beyond the ends.
    """
    slopes = _slopes(features)
    return np.concatenate([features, slopes, _slopes(slopes)], axis=1)


def normalized(features: Features) -> Features:
    """Each feature of mean 0 and deviation 1 over the utterance, (T, F); one that is constant, as in silence, is 0."""
    centred = features - features.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    constant = deviation < _QUIETEST
    scaled = np.where(constant, 0, centred / np.where(constant, 1, deviation))
    return scaled.astype(np.float32)


def _slopes(features: Features) -> Features:
    padded = np.pad(features, ((2, 2), (0, 0)), mode="edge")
    return (2 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / np.float32(10)


def _mel(frequency: float) -> float:
    return 1127 * float(np.log1p(frequency / 700))
