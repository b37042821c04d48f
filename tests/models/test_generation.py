import pytest
import torch

from trimtab.models.generation import generate
from trimtab.models.gpt import GPT, GPTConfig

PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])


def gpt(positions: str = "learned") -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(11, 8, 16, depth=2, num_heads=4, positions=positions, init_std=0.3, embedding_std=0.5)
    return GPT(config).double().eval()


def by_hand(model: GPT, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy generation without a cache; which tokens are read is written out for a context of 8."""
    given, start = tokens.shape[1], max(0, tokens.shape[1] - 8)
    for _ in range(count):
        if tokens.shape[1] - start > 8:
            start = tokens.shape[1] - 4
        tokens = torch.cat([tokens, model(tokens[:, start:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, given:]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("given", [1, 3, 8, 20])
def test_beyond_the_context_the_older_half_is_forgotten(positions: str, given: int) -> None:
    model = gpt(positions)
    prompt = torch.randint(0, 11, (2, given), generator=torch.Generator().manual_seed(1))
    assert torch.equal(generate(model, prompt, 25, temperature=0), by_hand(model, prompt, 25))


def test_a_forward_is_of_one_token() -> None:
    model, lengths = gpt(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    generate(model, PROMPT, 12)
    assert lengths == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]


def test_tokens_are_drawn_with_the_probabilities_of_the_model() -> None:
    model = gpt()
    prompt = PROMPT[:1].expand(20_000, -1)
    drawn = generate(model, prompt, 1, temperature=2.0, generator=torch.Generator().manual_seed(0)).flatten()
    expected = (model(PROMPT[:1])[0, -1] / 2).softmax(-1)
    found = torch.bincount(drawn, minlength=11) / 20_000
    assert (found - expected).abs().max() < 5 * (0.25 / 20_000) ** 0.5  # five standard errors of a share


def test_top_k_leaves_the_likeliest() -> None:
    model = gpt()
    prompt = PROMPT[:1].expand(500, -1)
    likeliest = model(PROMPT[:1])[0, -1].topk(3).indices.tolist()
    drawn = generate(model, prompt, 1, temperature=5.0, top_k=3)
    assert set(drawn.flatten().tolist()) == set(likeliest)
    assert generate(model, PROMPT, 2, top_k=1).equal(generate(model, PROMPT, 2, temperature=0))


def test_the_same_generator_draws_the_same() -> None:
    model = gpt()
    first, second, other = (
        generate(model, PROMPT, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.equal(second)
    assert not first.equal(other)


def test_nothing_may_be_asked_for() -> None:
    assert generate(gpt(), PROMPT, 0).shape == (2, 0)


@pytest.mark.parametrize(
    "arguments", [{"count": -1}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}]
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected count >= 0"):
        generate(gpt(), PROMPT, **{"count": 1, **arguments})


def test_there_must_be_a_token_to_follow() -> None:
    with pytest.raises(ValueError, match=r"T at least 1; got \(1, 0\)"):
        generate(gpt(), torch.zeros(1, 0, dtype=torch.int64), 3)


def test_the_coldest_temperature_takes_the_likeliest() -> None:
    for temperature in (1e-40, 1e-300):
        assert generate(gpt(), PROMPT, 5, temperature=temperature).equal(generate(gpt(), PROMPT, 5, temperature=0))


def test_top_k_of_equals_is_no_more() -> None:
    model = gpt()
    torch.nn.init.zeros_(model.head.weight)
    assert len(generate(model, PROMPT[:1].repeat(500, 1), 1, top_k=3).unique()) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(temperature: float) -> None:
    model = gpt()
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, PROMPT, 1, temperature=temperature)
