"""Trimtab in a bare PyTorch loop: a small Transformer learns which of ten symbols a sequence holds most often.

    python examples/bare_loop.py --folder runs/bare

The lines marked `# trimtab` are all there is to it. See the run, also while it goes on: `trimtab watch runs/bare`.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt  # trimtab


class Counter(nn.Module):
    """Symbols in, one score per symbol out."""

    def __init__(self, symbols: int = 10, width: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(symbols, width)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(dim=1))


def draw(batch_size: int = 64, length: int = 12) -> tuple[Tensor, Tensor]:
    """Sequences (batch, length) and the symbol that each holds most often (batch,)."""
    tokens = torch.randint(10, (batch_size, length))
    return tokens, F.one_hot(tokens, 10).sum(dim=1).argmax(dim=1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/bare", help="where the run is written: a new folder")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Counter()
    tt.reparametrize_(model)  # trimtab: if sigma-Reparam is wanted; the optimiser comes after it
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with tt.Watch(model, options.folder, every=20) as watch:  # trimtab
        for _ in range(options.steps):
            tokens, most = draw()
            loss = F.cross_entropy(model(tokens), most)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.step(loss)  # trimtab
    print(f"last loss {watch.last['loss']:.3f}, lowest entropy {watch.last['entropy_min']:.3f} of 1")  # trimtab


if __name__ == "__main__":
    main()
