"""What every stabilizer must hold: one test case to inherit, and the small models it is held on."""

import copy
import io
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import ConversionError
from trimtab.models import ViT, ViTConfig
from trimtab.stabilizers import STABILIZERS, fold_, parse, stabilize_
from trimtab.stabilizers.apply import changes_models

# Other tests add stabilizers of their own.
TRIMTABS = {name: cls for name, cls in STABILIZERS.items() if cls.__module__.startswith("trimtab.")}

# All are run in float64, so that the same function in another order of operations is the same to this:
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


class Small(NamedTuple):
    """A freshly drawn model, in float64 and training mode, without dropout, and how to use it."""

    model: nn.Module
    logits: Callable[[nn.Module], Tensor]
    loss: Callable[[nn.Module], Tensor]


def small(name: str, seed: int = 0) -> Small:
    """The model of a name; the same one for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[name]().double().train()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(17, (2, 6), generator=generator)
        images = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=generator)
        tokens = torch.randn(2, 5, 24, dtype=torch.float64, generator=generator)
        # norms at their start are blind to some mistakes
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, 1.0, 0.1)
                nn.init.normal_(module.bias, 0.0, 0.1)
    if name.startswith("vit"):
        return Small(model, lambda m: m(images), lambda m: F.cross_entropy(m(images), torch.tensor([1, 0, 4])))
    if name == "encoder":
        return Small(model, lambda m: m(tokens), lambda m: (m(tokens) - tokens.flip(0)).square().mean())

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(ids).logits.flatten(0, 1), ids.flip(1).flatten())

    return Small(model, lambda m: m(ids).logits, loss)


def step_(example: Small, lr: float = 1e-2, steps: int = 1) -> list[float]:
    """Take steps of AdamW; return the losses before each."""
    optimizer = torch.optim.AdamW(example.model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = example.loss(example.model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class StabilizerCase:
    """Inherit from this, name it Test..., and say what holds; every test then runs on every model named.

    Attributes:
        spec: the stabilizer with its options.
        models: names of models it applies to.
        refuses: names of models it cannot change.
        keeps_function: whether the model computes the same at the start.
        folds: whether `fold_` takes it out again.
        folded_is_plain: whether the folded weights, in a plain model, compute the same.
        adds_keys: whether the state dict has other keys than the plain model's.
        takes_plain: whether a plain checkpoint loads into the stabilized model.
        is_seen: whether a model tells by itself that it has this stabilizer already.
        pickles: whether a stabilized model can be pickled whole.
        partner: a stabilizer it can be applied together with, both being folded as far as they fold.
        clashes_with: a stabilizer it cannot be applied together with, if there is one.
    """

    spec: ClassVar[str]
    models: ClassVar[tuple[str, ...]] = ("vit", "gpt2", "llama", "bert", "encoder")
    refuses: ClassVar[tuple[str, ...]] = ()
    keeps_function: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    folded_is_plain: ClassVar[bool] = True
    adds_keys: ClassVar[bool] = True
    takes_plain: ClassVar[bool] = False
    is_seen: ClassVar[bool] = True
    pickles: ClassVar[bool] = True
    partner: ClassVar[str] = "sigma"
    clashes_with: ClassVar[str | None] = None

    def stabilized(self, name: str, seed: int = 0, steps: int = 0) -> Small:
        example = small(name, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 100)
            stabilize_(example.model, self.spec)
        step_(example, steps=steps)
        return example

    def test_function_at_the_start(self, model_name: str) -> None:
        plain, example = small(model_name), self.stabilized(model_name)
        before, after = plain.logits(plain.model), example.logits(example.model)
        if self.keeps_function:
            torch.testing.assert_close(after, before, **CLOSE)
        else:
            assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4)

    def test_gradient_is_that_of_the_function(self, model_name: str) -> None:
        example = self.stabilized(model_name)
        parameters = [p for p in example.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(example.loss(example.model), parameters, allow_unused=True)
        generator = torch.Generator().manual_seed(3)
        direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
        # central difference in float64: an error of about step² from the third derivative, 1e-16 / step from rounding
        step = 1e-5
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * step)
                sides.append(float(example.loss(example.model)))
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * step)
        assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-7)

    def test_it_trains(self, model_name: str) -> None:
        losses = step_(self.stabilized(model_name), lr=3e-3, steps=6)
        assert losses[-1] < losses[0]

    def test_state_round_trip(self, model_name: str) -> None:
        trained, fresh = self.stabilized(model_name, steps=2), self.stabilized(model_name, seed=1)
        buffer = io.BytesIO()
        torch.save(trained.model.state_dict(), buffer)
        buffer.seek(0)
        fresh.model.load_state_dict(torch.load(buffer))
        expected = trained.logits(trained.model)
        torch.testing.assert_close(fresh.logits(fresh.model), expected, rtol=0, atol=0)

    def test_state_of_a_plain_model(self, model_name: str) -> None:
        plain, example = small(model_name, seed=1).model, self.stabilized(model_name)
        if self.adds_keys:
            with pytest.raises(RuntimeError, match="Unexpected key"):
                plain.load_state_dict(example.model.state_dict())
        else:
            plain.load_state_dict(example.model.state_dict())
        if self.takes_plain or not self.adds_keys:
            example.model.load_state_dict(plain.state_dict())
        else:
            with pytest.raises(RuntimeError, match="Missing key"):
                example.model.load_state_dict(plain.state_dict())

    def test_a_copy_is_independent(self, model_name: str) -> None:
        example = self.stabilized(model_name, steps=1)
        before = example.logits(example.model).detach()
        twin = example._replace(model=copy.deepcopy(example.model))
        torch.testing.assert_close(twin.logits(twin.model), before, rtol=0, atol=0)
        step_(twin)
        assert not torch.equal(twin.logits(twin.model), before)
        torch.testing.assert_close(example.logits(example.model), before, rtol=0, atol=0)
        assert list(twin.model.state_dict()) == list(example.model.state_dict())

    def test_pickle(self, model_name: str) -> None:
        if not self.pickles:
            pytest.skip("cannot be pickled, as its docstring says")
        example = self.stabilized(model_name, steps=1)
        buffer = io.BytesIO()
        torch.save(example.model, buffer)
        buffer.seek(0)
        back = torch.load(buffer, weights_only=False)
        torch.testing.assert_close(example.logits(back), example.logits(example.model), rtol=0, atol=0)

    def test_evaluation_equals_training_mode(self, model_name: str) -> None:
        example = self.stabilized(model_name, steps=1)
        expected = example.logits(example.model)
        with torch.no_grad():  # where torch's encoder layers would take their fast path
            torch.testing.assert_close(example.logits(example.model.eval()), expected, **CLOSE)

    def test_fold(self, model_name: str) -> None:
        example, plain = self.stabilized(model_name, steps=2), small(model_name, seed=1)
        expected = example.logits(example.model)
        if not self.folds:
            with pytest.raises(ConversionError, match="nothing to fold"):
                fold_(example.model)
            return
        assert fold_(example.model) is example.model
        torch.testing.assert_close(example.logits(example.model), expected, **CLOSE)
        assert [type(m) for m in example.model.modules()] == [type(m) for m in plain.model.modules()]
        plain.model.load_state_dict(example.model.state_dict())
        if self.folded_is_plain:
            torch.testing.assert_close(plain.logits(plain.model), expected, **CLOSE)
        with pytest.raises(ConversionError, match="nothing to fold"):
            fold_(example.model)
        stabilize_(example.model, self.spec)  # and so it can be stabilized anew

    def test_twice_is_refused(self, model_name: str) -> None:
        model = self.stabilized(model_name).model
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ConversionError):
            stabilize_(model, self.spec)
        if self.is_seen:
            for each in parse(self.spec):
                with pytest.raises(ConversionError):
                    each.apply_(model)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)

    def test_together_with_its_partner(self, model_name: str) -> None:
        outputs = []
        for spec in (f"{self.spec}+{self.partner}", f"{self.partner}+{self.spec}"):  # the order of the words is none
            example = small(model_name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                stabilize_(example.model, spec)
            step_(example, steps=2)
            expected = example.logits(example.model)
            fold_(example.model)
            torch.testing.assert_close(example.logits(example.model), expected, **CLOSE)
            outputs.append(expected)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)

    def test_a_clash_leaves_the_model_as_it_was(self) -> None:
        if self.clashes_with is None:
            pytest.skip("goes together with all others")
        for spec in (f"{self.spec}+{self.clashes_with}", f"{self.clashes_with}+{self.spec}"):
            example, plain = small(self.models[0]), small(self.models[0])
            with pytest.raises(ConversionError):
                stabilize_(example.model, spec)
            torch.testing.assert_close(example.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
            torch.testing.assert_close(example.logits(example.model), plain.logits(plain.model), rtol=0, atol=0)

    def test_a_model_it_cannot_change_stays_as_it_was(self, refused_model_name: str) -> None:
        model = small(refused_model_name).model
        with pytest.raises(ConversionError):
            stabilize_(model, self.spec)
        torch.testing.assert_close(model.state_dict(), small(refused_model_name).model.state_dict(), rtol=0, atol=0)

    def test_compiled_equals_eager(self) -> None:
        example = self.stabilized(self.models[0])
        example.loss(example.model).backward()
        expected = [p.grad for p in example.model.parameters()]
        expected_logits = example.logits(example.model).detach()
        compiled = self.stabilized(self.models[0])
        torch._dynamo.reset()
        # the tracer alone: what inductor makes of the same operations is not ours
        program = torch.compile(compiled.model, backend="eager", fullgraph=True)
        compiled.loss(program).backward()
        torch.testing.assert_close([p.grad for p in compiled.model.parameters()], expected, **CLOSE)
        torch.testing.assert_close(compiled.logits(program).detach(), expected_logits, **CLOSE)

    def test_it_changes_a_model(self) -> None:
        assert any(changes_models(each) for each in parse(self.spec))


def _vit(**options: object) -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 5, "dim": 24, "depth": 2}
    return ViT(ViTConfig(**(sizes | {"num_heads": 4, "mlp_ratio": 2, "init": "xavier"} | options)))


def _hugging_face(model: str, **options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, model.replace("LMHeadModel", "").replace("ForCausalLM", "") + "Config")
    return getattr(transformers, model)(config(vocab_size=17, bos_token_id=0, eos_token_id=0, **options))


def _gpt2() -> nn.Module:
    sizes = {"n_positions": 8, "n_embd": 24, "n_layer": 1, "n_head": 4}
    return _hugging_face("GPT2LMHeadModel", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)


def _llama() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = _hugging_face("LlamaForCausalLM", hidden_size=24, intermediate_size=32, num_hidden_layers=1, **heads)
    for holder in list(model.modules()):  # its own norms compute in float32, whatever the model's dtype
        for name, child in list(holder.named_children()):
            if "RMSNorm" in type(child).__name__:
                setattr(holder, name, nn.RMSNorm(24, eps=1e-6))
    return model


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=17, max_position_embeddings=8, **sizes, **dropout)
    return transformers.BertForMaskedLM(config)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": _vit,
    "vit-post": lambda: _vit(norm="post"),
    "gpt2": _gpt2,
    "llama": _llama,
    "bert": _bert,
    "encoder": _encoder,
}
