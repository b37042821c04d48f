"""Every stabilizer of weights and residual branches keeps the laws of all."""

from stabilizer_case import StabilizerCase


class TestSigma(StabilizerCase):
    spec = "sigma"
    test_compiled_equals_eager = None  # tests/reparam/test_compile.py
    keeps_function = True
    folds = True
    takes_plain = True
    partner = "layer-scale"
    clashes_with = "weight-norm"


class TestSigmaOne(StabilizerCase):
    spec = "sigma:gamma_init=one:layers=blocks:init_std=0.3"
    models = ("vit", "gpt2")
    test_compiled_equals_eager = None  # tests/reparam/test_compile.py
    folds = True
    takes_plain = True
    partner = "layer-scale"
    clashes_with = "weight-norm"


class TestInitScale(StabilizerCase):
    spec = "init-scale"
    models = ("vit", "gpt2", "encoder")
    adds_keys = False
    is_seen = False  # it changes values alone


class TestSpectralNorm(StabilizerCase):
    spec = "spectral-norm"
    models = ("vit", "gpt2", "encoder")  # the machinery is that of sigma
    test_compiled_equals_eager = None  # tests/reparam/test_compile.py
    folds = True
    takes_plain = True
    partner = "layer-scale"
    clashes_with = "weight-norm"


class TestWeightNorm(StabilizerCase):
    spec = "weight-norm:layers=blocks"
    keeps_function = True
    folds = True
    pickles = False
    partner = "layer-scale"
    clashes_with = "sigma"


class TestLayerScale(StabilizerCase):
    spec = "layer-scale"
    folds = True
    clashes_with = "rezero"


class TestReZero(StabilizerCase):
    spec = "rezero"
    folds = True


class TestDeepNorm(StabilizerCase):
    spec = "deepnorm"
    models = ("vit-post", "bert", "encoder")
    refuses = ("vit", "gpt2", "llama")
    folds = True
    folded_is_plain = False  # eps of the norms is no part of a state dict
