"""Trimtab in Lightning's Trainer: a small Transformer learns to reverse strings.

    pip install 'trimtab[lightning]'
    python examples/lightning_trainer.py --folder runs/lightning

The lines marked `# trimtab` are all there is to it. See the run, also while it goes on: `trimtab watch runs/lightning`.
"""

import argparse
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trimtab.watch.sinks.lightning import TrimtabCallback  # trimtab


class Reverser(nn.Module):
    """Symbols in, at every place the scores of the symbol at the mirrored place out."""

    def __init__(self, symbols: int = 8, length: int = 10, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.positions = nn.Parameter(torch.randn(length, width) / 2)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.positions))


class Task(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Reverser()

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flip(1).flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/lightning", help="where the run is written: a new folder")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    loader = DataLoader(torch.randint(8, (32 * options.steps, 10)), batch_size=32)
    callback = TrimtabCallback(options.folder, every=20)  # trimtab
    trainer = pl.Trainer(
        callbacks=[callback],  # trimtab
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(), loader)
    print(f"alarms: {[alarm.message for alarm in callback.watch.alarms] or 'none'}")  # trimtab


if __name__ == "__main__":
    main()
