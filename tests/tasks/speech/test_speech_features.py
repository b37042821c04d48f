import numpy as np
import pytest
import torch

from trimtab.errors import DataError, RecipeError
from trimtab.tasks.speech.cepstra import cepstra
from trimtab.tasks.speech.features import log_mel, most_bins, normalized, num_frames, with_deltas
from trimtab.tasks.speech.spec_augment import SpecAugment, spec_augment_


def noise(count: int) -> np.ndarray:
    """A tone over noise, from -1 to 1."""
    draw = np.random.RandomState(0)
    return (0.3 * np.sin(np.arange(count) * 0.2) + 0.05 * draw.standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize(("sample_rate", "bins"), [(16000, 80), (8000, 40)])
def test_log_mel_is_that_of_transformers(sample_rate: int, bins: int) -> None:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    samples, window = noise(sample_rate), sample_rate * 25 // 1000
    padded = 1 << (window - 1).bit_length()
    filters = mel_filter_bank(
        padded // 2 + 1, bins, 20, sample_rate // 2, sample_rate, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    expected = spectrogram(
        samples.astype(np.float64) * 32768, window_function(window, "povey", periodic=False), window,
        sample_rate // 100, padded, power=2.0, center=False, preemphasis=0.97, remove_dc_offset=True,
        mel_filters=filters, log_mel="log", mel_floor=1.192092955078125e-07,
    ).T  # fmt: skip
    found = log_mel(samples, sample_rate, bins)
    assert found.shape == (98, bins)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # ours is in float32; 4e-5 was seen


@pytest.mark.parametrize("count", [0, 1, 399, 400, 559, 560, 561, 16000])
def test_only_whole_windows_are_frames(count: int) -> None:
    assert num_frames(count, 16000) == len(log_mel(noise(count), 16000, 23)) == max(0, (count - 400) // 160 + 1)


@pytest.mark.parametrize("sample_rate", [8000, 16000])
def test_too_many_bins_are_refused_and_no_bin_is_empty(sample_rate: int) -> None:
    most = most_bins(sample_rate)
    features = log_mel(noise(sample_rate), sample_rate, most)
    assert features.min() > np.log(1.2e-7) + 1  # an empty bin has the least energy that there is
    with pytest.raises(DataError, match=f"no more than {most} mel bins; got {most + 1}"):
        log_mel(noise(sample_rate), sample_rate, most + 1)


def test_features_of_an_utterance_have_mean_0_and_deviation_1() -> None:
    found = normalized(log_mel(noise(8000), 8000, 40))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=0), 1, atol=1e-5)


def test_silence_and_single_frames_are_zeros() -> None:
    silence = log_mel(np.zeros(8000, np.float32), 8000, 40)
    assert np.isfinite(silence).all()
    assert not normalized(silence).any()
    assert not normalized(log_mel(noise(200), 8000, 40)).any()


def test_deltas_are_those_of_kaldi_and_of_a_line() -> None:
    import kaldi_native_fbank

    features = np.random.RandomState(0).standard_normal((30, 13)).astype(np.float32)
    found = with_deltas(features)
    expected = kaldi_native_fbank.compute_deltas(kaldi_native_fbank.DeltaOptions(), features)
    assert found.shape == expected.shape == (30, 39)
    np.testing.assert_allclose(found[:, :26], expected[:, :26], atol=1e-6)
    # of the second derivative Kaldi repeats the ends of the features, we those of the first derivative
    np.testing.assert_allclose(found[4:-4], expected[4:-4], atol=1e-6)
    line = with_deltas(3 * np.arange(20, dtype=np.float32)[:, None] + 1)
    np.testing.assert_allclose(line[4:-4, 1:], np.tile([3.0, 0.0], (12, 1)), atol=1e-6)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_spec_augment_hides_bands_and_stretches_within_their_bounds() -> None:
    config = SpecAugment(freq_masks=1, freq_width=3, time_masks=1, time_width=8, time_share=0.2)
    widths, lengths, first_bins, first_frames = set(), set(), set(), set()
    for seed in range(300):
        found = spec_augment_(torch.ones(20, 10), config, generator(seed))
        columns, rows = (found == 0).all(dim=0), (found == 0).all(dim=1)
        assert torch.equal(found == 0, columns[None, :] | rows[:, None])
        for hidden, sizes, firsts in ((columns, widths, first_bins), (rows, lengths, first_frames)):
            where = hidden.nonzero().flatten()
            sizes.add(len(where))
            if len(where):
                assert where[-1] - where[0] + 1 == len(where)  # neighbours
                firsts.add(int(where[0]))
    assert widths == {0, 1, 2, 3}
    assert lengths == {0, 1, 2, 3, 4}  # a fifth of 20 frames
    assert first_bins == set(range(10))
    assert first_frames == set(range(20))


def test_spec_augment_draws_from_the_generator_alone() -> None:
    config = SpecAugment(freq_masks=2, freq_width=4, time_masks=2, time_width=5)
    torch.manual_seed(0)
    first = spec_augment_(torch.ones(20, 10), config, generator(1))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(spec_augment_(torch.ones(20, 10), config, generator(1)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(spec_augment_(torch.ones(20, 10), config, generator(2)), first)
    assert torch.equal(spec_augment_(torch.ones(20, 10), SpecAugment(), generator(1)), torch.ones(20, 10))
    # masks wider than the utterance hide no more than all of it
    spec_augment_(torch.ones(1, 1), SpecAugment(2, 99, 2, 99), generator(1))


def test_a_wrong_augment_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"augment\.time_share must be from 0 to 1, got 1\.5"):
        SpecAugment(time_share=1.5)
    with pytest.raises(RecipeError, match=r"augment\.freq_masks must be at least 0"):
        SpecAugment(freq_masks=-1)


def test_cepstra_of_silence_and_of_the_shortest_audio_are_finite() -> None:
    for count in (1, 400, 409, 410, 411, 569, 570):
        found = cepstra(noise(count))
        assert found.shape == (1 if count < 410 else 2 + (count - 410) // 160, 13)
        assert np.isfinite(found).all()
    assert np.isfinite(cepstra(np.zeros(5000, np.float32))).all()
    assert np.ptp(cepstra(np.zeros(5000, np.float32)), axis=0).max() == 0
