"""Beam search for an encoder-decoder: many sentences at once, each token one forward of one token. One beam is greedy.

Shape letters: B sentences, K hypotheses of each, V tokens of the target vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab.models.encoder_decoder import Cache
from trimtab.tasks.text.tokens import BEGIN, END, PAD, UNKNOWN

_NEVER = [PAD, BEGIN, UNKNOWN]


class Translation(NamedTuple):
    """One sentence.

    Attributes:
        tokens: without the end.
        log_prob: of the tokens and the end, given the source, by the model; nats.
        score: what it was chosen by, see `beam_search`.
    """

    tokens: list[int]
    log_prob: float
    score: float


@torch.no_grad()
def beam_search(
    model: nn.Module,
    source: Tensor,
    limits: Tensor,
    beam: int = 1,
    length_penalty: float = 0.0,
    goes_on: Callable[[bool], bool] = bool,
) -> list[Translation]:
    """Translate sentences by the search for the tokens that the model finds likely.

    At each token the likeliest continuations of all hypotheses of a sentence stay, `beam` of them. One that has ended
    is set aside, and leaves one place less to those that go on. A sentence is done when no place is left, or when no
    hypothesis can still become better than the best that has ended: `score` is the log-probability over
    ``((5 + length) / 6) ** length_penalty``, the length with the end (Wu et al., arXiv 1609.08144, equation 14). One
    beam is greedy search. The special tokens other than the end are never chosen. Of hypotheses that are equally likely
    the one of the better parent, then the lower token, counts as better: the same batch gives the same translations.

    Args:
        model: an `EncoderDecoder`, or what wraps one; in eval mode.
        source: (B, S), int64, padded at the end.
        limits: most tokens of each translation, the end included, (B,), at least 1: there, the end is forced.
        beam: hypotheses K of each sentence, at least 1.
        length_penalty: 0 for none; larger ones favour longer translations.
        goes_on: whether any process has sentences left, from whether this one has. Where a forward is one of all
            processes together, it must ask them.

    Returns:
        The best translation of each sentence.

    Raises:
        ValueError: `beam` or a limit is below 1, or `length_penalty` is negative.
    """
    if beam < 1 or length_penalty < 0 or int(limits.min()) < 1:
        raise ValueError(
            f"beam and limits must be at least 1 and length_penalty at least 0; got {beam}, {int(limits.min())} and "
            f"{length_penalty}"
        )
    size, device = len(source), source.device
    best = [Translation([], -torch.inf, -torch.inf)] * size
    alive = torch.arange(size, device=device)  # sentences that are not done
    cache = Cache()
    tokens = torch.full((size, beam, 1), BEGIN, device=device)  # of the hypotheses, the begin first
    log_probs = torch.full((size, beam), -torch.inf, device=device, dtype=torch.float64)
    log_probs[:, 0] = 0  # the others are none yet
    places = torch.full((size,), beam, device=device)
    source = source.repeat_interleave(beam, dim=0)  # (B K, S)
    length = 0
    while goes_on(len(alive) > 0):
        length += 1  # with no sentence left, what follows is of none, and other processes have their forward
        logits = model(source, tokens[..., -1].flatten().unsqueeze(1), cache)[:, -1]  # (B K, V)
        values, last = largest(_following(logits, (limits[alive] == length).repeat_interleave(beam)), beam)
        each = values.shape[-1]  # continuations of each hypothesis: of its others none can be among the best
        candidates = log_probs.unsqueeze(-1) + values.view(len(alive), beam, each)
        log_probs, order = (found[:, :beam] for found in candidates.flatten(1).sort(descending=True, stable=True))
        parents, last = order // each, last.view(len(alive), beam * each).gather(1, order)  # (B, K) each
        log_probs = log_probs.masked_fill(torch.arange(beam, device=device) >= places.unsqueeze(-1), -torch.inf)
        tokens = torch.cat([tokens.gather(1, parents.unsqueeze(-1).expand_as(tokens)), last.unsqueeze(-1)], dim=-1)
        ended = (last == END) & (log_probs > -torch.inf)
        penalty = ((5 + length) / 6) ** length_penalty
        for row, hypothesis in ended.nonzero().tolist():
            log_prob, sentence = float(log_probs[row, hypothesis]), int(alive[row])
            if log_prob / penalty > best[sentence].score:
                best[sentence] = Translation(tokens[row, hypothesis, 1:-1].tolist(), log_prob, log_prob / penalty)
        places = places - ended.sum(-1)
        log_probs = log_probs.masked_fill(ended, -torch.inf)

        # The best that a hypothesis can still come to: all that follows is certain, and as long as may be.
        reachable = log_probs.amax(-1) / ((5 + limits[alive]) / 6) ** length_penalty
        reached = torch.tensor(
            [best[sentence].score for sentence in alive.tolist()], device=device, dtype=torch.float64
        )
        going = (reachable > reached) & (limits[alive] > length)
        rows = torch.arange(len(alive), device=device).unsqueeze(-1) * beam + parents  # (B, K), in the cache
        alive, tokens, log_probs, places, rows = (kept[going] for kept in (alive, tokens, log_probs, places, rows))
        dropped = not bool(going.all())
        if dropped or beam > 1:
            cache.select_(rows.flatten(), same_sources=not dropped)
    return best


def _following(logits: Tensor, at_limit: Tensor) -> Tensor:
    """Log-probabilities of the following token, (R, V), with -inf for one that must not follow, or is no number.

    Args:
        logits: (R, V).
        at_limit: which rows must end, (R,).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.log_softmax(-1, dtype=wide).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
    log_probs[:, _NEVER] = -torch.inf
    if bool(at_limit.any()):
        others = torch.arange(logits.shape[-1], device=logits.device) != END
        log_probs.masked_fill_(at_limit.unsqueeze(-1) & others, -torch.inf)
    return log_probs


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row and where they are, from high to low; of equal ones the first come first.

    `torch.topk` does not say which of equal values it takes.

    Args:
        values: (B, N), without NaN.
        count: how many, if there are so many.

    Returns:
        Values and indices, each (B, count).
    """
    count = min(count, values.shape[-1])
    least = values.topk(count).values[:, -1:]
    above, equal = values > least, values == least
    chosen = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    indices = chosen.nonzero()[:, 1].view(len(values), count)
    found, order = values.gather(1, indices).sort(descending=True, stable=True)
    return found, indices.gather(1, order)
