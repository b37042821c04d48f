"""BLEU by sacrebleu, as sums over sentences: those of any batches and processes add up to that of the whole set.

Papineni et al., ACL 2002; Post, "A Call for Clarity in Reporting BLEU Scores", 2018, arXiv 1804.08771.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import RecipeError

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

ORDER = 4  # of the longest n-grams
COUNTS = (
    *(f"bleu_correct_{n}" for n in range(1, ORDER + 1)),
    *(f"bleu_total_{n}" for n in range(1, ORDER + 1)),
    "bleu_length",
    "bleu_reference_length",
)
"""What is counted of each sentence: its n-grams that are in the reference, all of them, its words, the reference's."""


def counts(translations: Sequence[str], references: Sequence[str]) -> dict[str, Tensor]:
    """The counts that BLEU is made of, each (B,), float64, for sentences as plain text, one reference each."""
    bleu, _ = _metric()
    found = [
        bleu.corpus_score([ours], [[theirs]]) for ours, theirs in zip(translations, references, strict=True)
    ]  # of a corpus of one sentence, since that of a sentence smooths otherwise
    rows = [[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in found]
    return dict(zip(COUNTS, torch.tensor(rows, dtype=torch.float64).view(-1, len(COUNTS)).unbind(1), strict=True))


def corpus_bleu(sums: Mapping[str, float]) -> float:
    """BLEU, 0 to 100, from the sums of the counts over a whole set; equal to sacrebleu's corpus_bleu of the set."""
    bleu, _ = _metric()
    correct, total = ([round(sums[f"bleu_{kind}_{n}"]) for n in range(1, ORDER + 1)] for kind in ("correct", "total"))
    score = bleu.compute_bleu(
        correct,
        total,
        round(sums["bleu_length"]),
        round(sums["bleu_reference_length"]),
        smooth_method=bleu.smooth_method,
        smooth_value=bleu.smooth_value,
        effective_order=bleu.effective_order,
        max_ngram_order=ORDER,
    )
    return float(score.score)


def signature() -> str:
    """The line by which sacrebleu tells how the score is made, with its version."""
    return _metric()[1]


@cache
def _metric() -> "tuple[BLEU, str]":
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise RecipeError(
            "BLEU comes from the package sacrebleu, which is missing: pip install 'trimtab[lab]'"
        ) from None
    bleu = BLEU()
    bleu.corpus_score(["a"], [["a"]])  # its signature tells the number of references only then
    return bleu, str(bleu.get_signature())
