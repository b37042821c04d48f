"""Runs that learn raise no alarm, however they start."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt

SYMBOLS, LENGTH, STEPS = 24, 8, 60


class Encoder(nn.Module):
    """A Transformer that starts as BERT and GPT do: weights so small (std 0.02) that attention is uniform."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, SYMBOLS)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Embedding(SYMBOLS, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, SYMBOLS))


def adam(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("make", "optimizer", "warmup"),
    [
        (Encoder, adam(2e-3), STEPS),  # heads are uniform for long, and nothing is wrong
        (Encoder, adam(5e-3), 0),  # the first step changes the weights by a quarter
        (perceptron, lambda model: torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5), 0),
    ],
)
def test_a_run_that_learns_raises_no_alarm(
    make: Callable[[], nn.Module], optimizer: Callable[[nn.Module], torch.optim.Optimizer], warmup: int, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, table = make(), torch.randperm(SYMBOLS)
        optim = optimizer(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optim, lambda i: min(1.0, (i + 1) / warmup) if warmup else 1.0)
        losses, ratios, entropies = [], [], []
        with tt.Watch(model, tmp_path / "run", every=1) as watch:
            for _ in range(STEPS):
                tokens = torch.randint(SYMBOLS, (16, LENGTH))

                def closure(tokens: Tensor = tokens) -> Tensor:
                    optim.zero_grad()
                    loss = F.cross_entropy(model(tokens).flatten(0, 1), table[tokens].flatten())
                    loss.backward()
                    return loss

                loss = optim.step(closure)
                schedule.step()
                watch.step(loss)
                losses.append(loss.item())
                ratios.append(sorted(watch.last["update_ratio"].values()))
                entropies.append(watch.last.get("entropy_min", 0.0))
    assert losses[-1] < 0.5 * losses[0]
    # What these runs are here for, else they prove nothing: uniform heads for ten lines, or large first updates.
    limits = tt.Thresholds()
    uniform = limits.dead_entropy is not None and min(entropies[: limits.dead_lines]) > limits.dead_entropy
    large = limits.update_ratio is not None and ratios[0][len(ratios[0]) // 2] > 2 * limits.update_ratio
    assert uniform or large
    assert watch.alarms == []
