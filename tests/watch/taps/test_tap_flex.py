"""flex_attention: functions of the score and masks, called plainly or compiled."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trimtab.watch.observe import observe
from trimtab.watch.taps import AttentionTap

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

compiled_flex = torch.compile(flex_attention, backend="eager")


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


class Model(nn.Module):
    def __init__(self, how: str, **options) -> None:
        super().__init__()
        self.linear, self.how, self.options = nn.Linear(8, 8), how, options

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.linear(x), x[:, ::2] if self.options.get("enable_gqa") else x
        if self.how == "imported":
            return flex_attention(query, key, key, **self.options)
        if self.how == "compiled":
            return compiled_flex(query, key, key, **self.options)
        return flex.flex_attention(query, key, key, **self.options)


def expected(model: Model, x: Tensor, change, mask: Tensor | None = None) -> list[float]:
    """By definition: change(logits (B, H, L, S)), then the mask."""
    key = x[:, ::2].repeat_interleave(2, 1) if model.options.get("enable_gqa") else x
    logits = change(model.linear(x).double() @ key.double().mT * model.options.get("scale", 8**-0.5))
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return torch.special.entr(logits.softmax(-1)).sum(-1).mean((0, 2)).tolist()


@pytest.mark.parametrize("how", ["imported", "by its module", "compiled"])
def test_scores_and_masks(how) -> None:
    torch.manual_seed(0)
    slopes = torch.tensor([0.5, 0.1, 0.2, 0.3])

    def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return 5 * torch.tanh(score / 5) - slopes[h] * (q - k)

    mask = create_block_mask(causal, None, None, 16, 16, device="cpu")
    model, x = Model(how, score_mod=alibi, block_mask=mask, scale=0.6), torch.randn(2, 4, 16, 8) * 2
    with torch.no_grad():
        with observe(model) as seen:
            model(x)
        place = torch.arange(16)
        distance = place[:, None] - place
        entropies = expected(model, x, lambda s: 5 * (s / 5).tanh() - slopes[:, None, None] * distance, distance >= 0)
    assert list(seen.heads) == ["(root)"]
    heads = seen.heads["(root)"]
    assert heads.entropy == pytest.approx(entropies, abs=1e-5)
    assert bool((heads.bound <= heads.entropy + 1e-6).all())
    assert [(row.back_end, row.seen) for row in seen.coverage] == [("flex_attention", "exact")]


def test_fewer_key_heads_and_the_number_of_visible_keys() -> None:
    """Two documents of 8 tokens: nobody sees more than 8 keys, which is what the entropy is divided by."""
    torch.manual_seed(0)
    document = torch.arange(16) // 8
    mask = create_block_mask(lambda b, h, q, k: document[q] == document[k], None, None, 16, 16, device="cpu")
    model, x = Model("imported", block_mask=mask, enable_gqa=True), torch.randn(2, 4, 16, 8)
    with torch.no_grad(), observe(model) as seen:
        model(x)
    same = document[:, None] == document
    entropies = torch.tensor(expected(model, x, lambda s: s, same))
    heads = seen.heads["(root)"]
    torch.testing.assert_close(heads.entropy.double(), entropies.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(heads.normalized, heads.entropy / torch.tensor(8.0).log())


def test_compiled_flex_in_an_eager_model_is_not_compiled_again() -> None:
    torch._dynamo.reset()
    model, x = Model("compiled").requires_grad_(False), torch.randn(2, 4, 16, 8)  # torch has no backward on CPU
    tap = AttentionTap(model, lambda: wanted)
    wanted = False
    model(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for wanted in (True, False, True):
            model(x)
            assert list(tap.take()) == (["(root)"] if wanted else [])
    tap.close()
    model(x)
