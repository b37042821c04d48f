"""A recipe of one's own: model, data and loss in a Python file, and all the rest is there.

    trimtab train examples/own_recipe.py:Adding --width 32 --stabilizer sigma --lr 0.01
    trimtab compare examples/own_recipe.py:Adding --stabilizers none,sigma --lrs 1e-3:1e-1:5 --seeds 3

A small Transformer learns to add: it reads "37+48=" and writes "085", one character after the other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.tasks.recipe import Recipe, Schedule
from trimtab.tasks.task import Examples, Task

SYMBOLS = "0123456789+="


class Writer(nn.Module):
    """Characters (B, L) in, scores for the character after each (B, L, symbols) out."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding = nn.Embedding(len(SYMBOLS), width)
        self.position = nn.Embedding(16, width)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(SYMBOLS))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.embedding(tokens) + self.position(torch.arange(length, device=tokens.device))
        return self.head(self.encoder(x, mask=mask, is_causal=True))


@dataclass(frozen=True, kw_only=True)
class Adding(Recipe):
    """A small Transformer that adds two numbers, on text made here: a minute on a laptop."""

    width: int = 64
    depth: int = 2
    lr: float = 5e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    clip: float | None = 1.0
    steps: int = 600
    batch_size: int = 128
    watch_every: int = 50
    eval_every: int = 100

    def task(self) -> Task:
        """Make the sums, the model, the loss and the score."""
        pairs = torch.cartesian_prod(torch.arange(100), torch.arange(100))  # (10000, 2)
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
        text = [f"{a:02}+{b:02}={a + b:03}" for a, b in pairs.tolist()]
        tokens = torch.tensor([[SYMBOLS.index(symbol) for symbol in line] for line in text])  # (10000, 9)

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            return F.cross_entropy(model(batch[:, :-1])[:, -3:].flatten(0, 1), batch[:, -3:].flatten())

        def score(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
            return {"accuracy": (model(batch[:, :-1])[:, -3:].argmax(dim=-1) == batch[:, -3:]).all(dim=1).float()}

        return Task(
            model=Writer(self.width, self.depth),
            train=Examples(9000, lambda indices, generator: tokens[:9000][indices]),
            evaluation=Examples(1000, lambda indices, generator: tokens[9000:][indices]),
            loss=loss,
            score=score,
            metric="accuracy",
            higher_is_better=True,
        )
