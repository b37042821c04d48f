"""Three small tasks on which Transformers can be made to fail in seconds: digits, characters, string reversal.

A task gives a model and a function that draws the next batch and returns its loss; both are decided by the seed.

  digits       the images task of trimtab: the ViT of the recipe vit-digits, 8×8 digits in 16 patches, 4 layers, d 64
  shakespeare  a causal Transformer over the characters of tiny Shakespeare: 3 layers, d 64, 64 characters
  reverse      an encoder that returns 16 symbols in reverse order: 12 layers, d 32
"""

import gzip
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from trimtab.models.vit import ViT
from trimtab.tasks.images import load_images, vit_digits
from trimtab.train.order import batches

Objective = Callable[[], Tensor]
SYMBOLS = 10


@dataclass(frozen=True)
class Setup:
    """What is trained, all but the learning rate.

    Attributes:
        task: "digits", "shakespeare" or "reverse".
        norm: where the LayerNorms are: "pre", "post" or "none".
        stabilizer: "none", or "sigma": sigma-Reparam on every layer with gamma 1.
        init_std: weights are drawn from N(0, init_std²); None: Glorot's start.
        depth: number of layers; None: the task's own.
        seed: decides the weights at the start and every batch.
    """

    task: str
    norm: str = "pre"
    stabilizer: str = "none"
    init_std: float | None = None
    depth: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """What belongs to a task.

    Attributes:
        make: draws the model and the function that gives the next loss.
        steps: optimiser steps in a run.
        chance: loss of the best answer that does not look at the input, nats.
    """

    make: Callable[[Setup], tuple[nn.Module, Objective]]
    steps: int
    chance: float


class Transformer(nn.Module):
    """Tokens (B, L) in, logits (B, L, vocabulary) out; every token predicts one symbol."""

    def __init__(self, setup: Setup, vocabulary: int, length: int, dim: int, depth: int, is_causal: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(0.5 * torch.randn(length, dim))  # (L, D)
        self.blocks = nn.ModuleList(Block(dim, setup.norm, is_causal) for _ in range(setup.depth or depth))
        self.norm = nn.LayerNorm(dim) if setup.norm == "pre" else nn.Identity()
        self.head = nn.Linear(dim, vocabulary)
        nn.init.normal_(self.embedding.weight, std=0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if setup.init_std is None:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=setup.init_std)
        if setup.stabilizer == "sigma":
            tt.reparametrize_(self, tt.SigmaReparam(gamma_init="one"))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position  # (B, L, D)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Self-attention of 4 heads, then an MLP, each with a residual connection and its norm before, after or absent."""

    def __init__(self, dim: int, norm: str, is_causal: bool) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(dim, is_causal), MLP(dim)
        self.norms = nn.ModuleList(nn.Identity() if norm == "none" else nn.LayerNorm(dim) for _ in range(2))
        self.post = norm == "post"

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip((self.attention, self.mlp), self.norms, strict=True):
            x = norm(x + layer(x)) if self.post else x + layer(norm(x))
        return x


class Attention(nn.Module):
    """Self-attention of 4 heads, (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, is_causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.is_causal = is_causal

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # (B, 4, L, D / 4) each
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with a GELU between them, (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def digits(setup: Setup) -> tuple[nn.Module, Objective]:
    recipe = vit_digits()
    config = replace(recipe.model, norm=setup.norm, depth=setup.depth or recipe.model.depth)
    if setup.init_std is not None:
        config = replace(config, init="normal", init_std=setup.init_std)
    model = ViT(config)
    if setup.stabilizer == "sigma":
        tt.reparametrize_(model, tt.SigmaReparam(gamma_init="one"))
    data = load_images("digits")
    images = data.standardize(data.train.read(torch.arange(data.train.size), None))
    order = batches(data.train.size, 64, setup.seed)

    def next_loss() -> Tensor:
        batch = next(order)  # (B,)
        return F.cross_entropy(model(images[batch]), data.train.labels[batch])

    return model, next_loss


def shakespeare(setup: Setup) -> tuple[nn.Module, Objective]:
    text, vocabulary = _shakespeare()
    model = Transformer(setup, vocabulary, length=64, dim=64, depth=3, is_causal=True)
    generator = torch.Generator().manual_seed(setup.seed)

    def next_loss() -> Tensor:
        starts = torch.randint(len(text) - 64, (32, 1), generator=generator)
        window = text[starts + torch.arange(65)]  # (B, L + 1)
        return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    return model, next_loss


def reverse(setup: Setup) -> tuple[nn.Module, Objective]:
    model = Transformer(setup, SYMBOLS, length=16, dim=32, depth=12, is_causal=False)
    generator = torch.Generator().manual_seed(setup.seed)

    def next_loss() -> Tensor:
        symbols = torch.randint(SYMBOLS, (64, 16), generator=generator)
        return F.cross_entropy(model(symbols).flatten(0, 1), symbols.flip(1).flatten())

    return model, next_loss


@cache
def _shakespeare() -> tuple[Tensor, int]:
    """The text as numbers of characters, and how many characters there are."""
    folder = os.environ.get("TRIMTAB_DATA")
    if folder is None:
        raise SystemExit("set TRIMTAB_DATA to the folder that holds tinyshakespeare/input.txt.gz")
    raw = gzip.decompress((Path(folder) / "tinyshakespeare" / "input.txt.gz").read_bytes())
    characters, text = torch.tensor(list(raw)).unique(return_inverse=True)
    return text, len(characters)


TASKS = {
    "digits": Task(digits, steps=200, chance=math.log(10)),
    "shakespeare": Task(shakespeare, steps=250, chance=3.31),  # entropy of one character of the text, by its frequency
    "reverse": Task(reverse, steps=300, chance=math.log(SYMBOLS)),
}


def make(setup: Setup) -> tuple[nn.Module, Objective]:
    """Draw a setup's model from its seed."""
    torch.manual_seed(setup.seed)
    return TASKS[setup.task].make(setup)
