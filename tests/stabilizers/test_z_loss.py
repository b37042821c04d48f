"""z-loss: recorded in training, of the logits, with the gradient it should have."""

import pytest
import torch
from attention_calls import images, language_model, tokens, vit
from torch import nn

from trimtab.errors import ConversionError, RecipeError
from trimtab.stabilizers import auxiliary_loss, parse, stabilize_
from trimtab.stabilizers.z_loss import z_loss


def test_value_and_gradient_in_closed_form() -> None:
    logits = (3 * torch.randn(4, 5, 7, dtype=torch.float64)).requires_grad_()
    log_z = logits.detach().exp().sum(-1, keepdim=True).log()
    loss = z_loss(logits)
    torch.testing.assert_close(loss, (log_z**2).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, 2 * log_z * (logits.detach() - log_z).exp() / 20)


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.full((2, 3000), 10.0, dtype=torch.bfloat16)
    expected = (torch.tensor(3000.0).log() + 10) ** 2
    assert z_loss(logits).dtype == torch.float32
    torch.testing.assert_close(z_loss(logits), expected)


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_recorded_in_training_alone(kind: str) -> None:
    model = vit() if kind == "vit" else language_model(kind)
    inputs = images() if kind == "vit" else tokens()
    stabilize_(model, "z-loss:coefficient=0.01")
    output = model(inputs)
    logits = output if kind == "vit" else output.logits
    term = auxiliary_loss(model)
    assert term is not None
    torch.testing.assert_close(term, 0.01 * logits.logsumexp(-1).square().mean())
    assert auxiliary_loss(model) is None
    with torch.no_grad():
        model(inputs)
    model.eval()(inputs)
    assert auxiliary_loss(model) is None


@pytest.mark.parametrize("together", [True, False])
def test_of_the_capped_logits_when_there_is_a_cap(together: bool) -> None:
    model = vit()
    specs = ("z-loss:coefficient=1", "softcap:attention=none:logits=1")
    for spec in ["+".join(specs)] if together else specs:
        stabilize_(model, spec)
    logits = model(images())
    torch.testing.assert_close(auxiliary_loss(model), logits.logsumexp(-1).square().mean())
    assert float(logits.detach().abs().max()) <= 1


def test_refused() -> None:
    with pytest.raises(ConversionError, match="z-loss:head="):
        stabilize_(nn.Sequential(nn.Linear(3, 3)), "z-loss")
    with pytest.raises(RecipeError, match="coefficient"):
        parse("z-loss:coefficient=0")
