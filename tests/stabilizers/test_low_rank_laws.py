"""Low-rank attention keeps the laws of all stabilizers."""

from stabilizer_case import StabilizerCase


class TestLowRank(StabilizerCase):
    spec = "low-rank"
    models = ("vit", "gpt2", "llama")
    refuses = ("encoder",)
    folds = True


class TestLowRankFresh(StabilizerCase):
    spec = "low-rank:rank=5:start=fresh"
    models = ("vit",)
    test_compiled_equals_eager = None  # as with the other start
    folds = True
    partner = "layer-scale"
