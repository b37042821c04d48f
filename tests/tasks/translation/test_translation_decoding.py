"""Beam search: its scores are the model's, one beam is greedy, a wide one finds the best of all sentences."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from trimtab.tasks.text.tokens import BEGIN, END, UNKNOWN
from trimtab.tasks.translation.decoding import Translation, beam_search, largest

V = 7
ALLOWED = (END, *range(UNKNOWN + 1, V))


def model(seed: int, vocab: int = V) -> EncoderDecoder:
    """Random weights, large enough for sentences of different probabilities."""
    torch.manual_seed(seed)
    config = EncoderDecoderConfig(vocab, vocab, dim=8, encoder_depth=1, decoder_depth=2, num_heads=2, norm="pre")
    made = EncoderDecoder(config).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.7)
    return made.requires_grad_(False)


def sources(seed: int, vocab: int = V, size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, vocab, (size, 6), generator=generator)
    for row, length in enumerate(torch.randint(1, 6, (size,), generator=generator).tolist()):
        tokens[row, length - 1] = END
        tokens[row, length:] = 0
    return tokens


def log_prob(model: nn.Module, source: Tensor, sentence: list[int]) -> float:
    """Of one sentence with its end, from a forward over all of it."""
    whole = [*sentence, END]
    logits = model(source[source != 0][None], torch.tensor([[BEGIN, *whole[:-1]]]))[0]
    return float(logits.log_softmax(-1)[range(len(whole)), whole].sum())


def greedy(model: nn.Module, source: Tensor, limit: int) -> list[int]:
    """By hand, without a cache."""
    found: list[int] = []
    while len(found) < limit - 1:
        logits = model(source[source != 0][None], torch.tensor([[BEGIN, *found]]))[0, -1]
        following = max(ALLOWED, key=lambda token: float(logits[token]))
        if following == END:
            break
        found.append(following)
    return found


def by_score(model: nn.Module, source: Tensor, limit: int, penalty: float) -> Translation:
    """The best of all sentences that are not longer than the limit."""
    best = Translation([], -torch.inf, -torch.inf)
    for length in range(limit):
        for sentence in itertools.product(ALLOWED[1:], repeat=length):
            told = log_prob(model, source, list(sentence))
            score = told / ((5 + length + 1) / 6) ** penalty
            if score > best.score:
                best = Translation(list(sentence), told, score)
    return best


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), beam=st.integers(1, 5), penalty=st.sampled_from([0.0, 0.6, 2.0]))
def test_the_score_is_the_models_log_probability(seed: int, beam: int, penalty: float) -> None:
    ours, source = model(seed), sources(seed)
    limits = torch.tensor([1, 3, 8, 5, 8])
    for row, found in enumerate(beam_search(ours, source, limits, beam, penalty)):
        assert len(found.tokens) < limits[row]
        assert set(found.tokens) <= set(ALLOWED[1:])
        assert found.log_prob == pytest.approx(log_prob(ours, source[row], found.tokens), rel=1e-9)
        assert found.score == pytest.approx(found.log_prob / ((5 + len(found.tokens) + 1) / 6) ** penalty)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_one_beam_is_greedy(seed: int) -> None:
    ours, source = model(seed), sources(seed)
    limits = torch.tensor([8, 1, 6, 8, 4])
    found = beam_search(ours, source, limits)
    assert [each.tokens for each in found] == [
        greedy(ours, row, limit) for row, limit in zip(source, limits.tolist(), strict=True)
    ]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_best_sentence_of_all(seed: int, penalty: float) -> None:
    ours, source = model(seed), sources(seed, size=2)
    found = beam_search(ours, source, torch.tensor([4, 3]), beam=40, length_penalty=penalty)  # 3^3 + ... prefixes
    for row, limit in ((0, 4), (1, 3)):
        expected = by_score(ours, source[row], limit, penalty)
        assert found[row].tokens == expected.tokens
        assert found[row].score == pytest.approx(expected.score, rel=1e-9)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), beam=st.integers(1, 4))
def test_a_batch_is_its_sentences(seed: int, beam: int) -> None:
    ours, source, limits = model(seed), sources(seed), torch.tensor([8, 3, 6, 8, 4])
    together = beam_search(ours, source, limits, beam, 0.6)
    for row, found in enumerate(together):
        own = source[row][source[row] != 0][None]
        alone = beam_search(ours, own, limits[row : row + 1], beam, 0.6)[0]
        assert found.tokens == alone.tokens
        assert found.score == pytest.approx(alone.score, rel=1e-9)


class Slow:
    """Beam search of one sentence, without tensors, caches or early ends: all of it is gone through."""

    def __init__(self, model: nn.Module, source: Tensor) -> None:
        self.model, self.source = model, source[source != 0][None]

    def best(self, limit: int, beam: int, penalty: float) -> Translation:
        going: list[tuple[float, list[int]]] = [(0.0, [])]
        ended: list[Translation] = []
        for length in range(1, limit + 1):
            candidates = []
            for told, tokens in going:
                logits = self.model(self.source, torch.tensor([[BEGIN, *tokens]]))[0, -1].log_softmax(-1)
                allowed = ALLOWED if length < limit else (END,)
                candidates += [(told + float(logits[token]), [*tokens, token]) for token in allowed]
            candidates.sort(key=lambda pair: -pair[0])
            kept = candidates[: beam - len(ended)]
            for told, tokens in kept:
                if tokens[-1] == END:
                    ended.append(Translation(tokens[:-1], told, told / ((5 + length) / 6) ** penalty))
            going = [pair for pair in kept if pair[1][-1] != END]
        return max(ended, key=lambda each: each.score)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), beam=st.integers(2, 4), penalty=st.sampled_from([0.0, 0.6, 2.0]))
def test_it_is_the_slow_search_by_hand(seed: int, beam: int, penalty: float) -> None:
    ours, source = model(seed), sources(seed, size=2)
    found = beam_search(ours, source, torch.tensor([6, 6]), beam, penalty)
    for row in range(2):
        assert found[row].tokens == Slow(ours, source[row]).best(6, beam, penalty).tokens


def test_equal_hypotheses_have_an_order() -> None:
    ours = model(0)
    nn.init.zeros_(ours.head.weight)  # every token is as likely as any other
    found = beam_search(ours, sources(0), torch.tensor([4] * 5), beam=3)
    assert [each.tokens for each in found] == [[]] * 5  # the end is the first of them that is allowed
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [-torch.inf] * 5])
    top, indices = largest(values, 2)
    assert indices.tolist() == [[1, 2], [0, 1]]
    assert top.tolist() == [[3.0, 3.0], [-torch.inf] * 2]
    assert largest(torch.tensor([[2.0, 1.0, 2.0, 0.0]]), 3)[1].tolist() == [[0, 2, 1]]


def test_a_broken_model_ends() -> None:
    ours = model(0)
    nn.init.constant_(ours.decoder[0].mlp.up.bias, torch.nan)
    assert beam_search(ours, sources(0), torch.tensor([4] * 5), beam=3) == [Translation([], -torch.inf, -torch.inf)] * 5


def test_each_token_costs_one_forward_of_one_token() -> None:
    ours = model(3)
    seen: list[tuple[int, ...]] = []
    ours.decoder[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    found = beam_search(ours, sources(3), torch.tensor([9] * 5), beam=2)
    assert len(seen) <= 9
    assert max(len(each.tokens) for each in found) < len(seen)
    assert all(shape[1] == 1 for shape in seen)
    assert [shape[0] for shape in seen] == sorted((shape[0] for shape in seen), reverse=True)  # what is done is dropped
    assert seen[0][0] == 10


def test_other_processes_get_their_forwards() -> None:
    ours = model(3)
    forwards: list[int] = []
    ours.register_forward_hook(lambda *_: forwards.append(1))
    blocks: list[str] = []
    ours.encoder[0].register_forward_hook(lambda *_: blocks.append("encoder"))
    ours.decoder[0].register_forward_hook(lambda *_: blocks.append("decoder"))
    alone = beam_search(ours, sources(3), torch.tensor([9] * 5), beam=2)
    own = len(forwards)
    asked: list[bool] = []

    def goes_on(mine: bool) -> bool:
        asked.append(mine)
        return len(asked) <= own + 4  # another process takes four more

    assert beam_search(ours, sources(3), torch.tensor([9] * 5), beam=2, goes_on=goes_on) == alone
    assert len(forwards) == own + own + 4
    assert asked == [True] * own + [False] * 5
    assert blocks[own + 1 :] == ["encoder"] + ["decoder"] * (own + 4)  # of the same blocks as the other's


@pytest.mark.parametrize("arguments", [{"beam": 0}, {"length_penalty": -0.1}, {"limits": torch.tensor([3, 0])}])
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1 and length_penalty at least 0"):
        beam_search(model(0), sources(0, size=2), **{"limits": torch.tensor([3, 3]), **arguments})
