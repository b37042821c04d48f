"""The stabilizers of attention and logits keep the laws of all."""

from stabilizer_case import StabilizerCase


class TestQKNorm(StabilizerCase):
    spec = "qk-norm"
    models = ("vit", "gpt2", "llama", "encoder")
    clashes_with = "qk-clip"


class TestQKNormRMS(StabilizerCase):
    spec = "qk-norm:norm=rms:affine=false"
    models = ("llama",)
    adds_keys = False
    test_compiled_equals_eager = None  # as that of the LayerNorm


class TestSoftCapOfAttention(StabilizerCase):
    spec = "softcap:attention=0.01:logits=none"
    models = ("vit", "llama", "encoder")
    adds_keys = False


class TestSoftCapOfLogits(StabilizerCase):
    spec = "softcap:attention=none:logits=0.5"
    models = ("vit", "gpt2")
    refuses = ("encoder",)
    adds_keys = False
    test_compiled_equals_eager = None  # as the soft cap of attention


class TestQKClip(StabilizerCase):
    spec = "qk-clip:tau=0.01"
    models = ("vit", "llama", "encoder")
    test_compiled_equals_eager = None  # there is a test of its own
    keeps_function = True
    adds_keys = False
    clashes_with = "qk-norm"


class TestZLoss(StabilizerCase):
    spec = "z-loss"
    models = ("vit", "bert")
    refuses = ("encoder",)
    keeps_function = True
    adds_keys = False
