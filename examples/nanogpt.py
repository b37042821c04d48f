"""Trimtab in a GPT written as in nanoGPT: one file, fused attention, gradient accumulation; it learns its own source.

    python examples/nanogpt.py --folder runs/nanogpt

The lines marked `# trimtab` are all there is to it. See the run, also while it goes on: `trimtab watch runs/nanogpt`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt  # trimtab


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 32
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_batch(data: Tensor, block_size: int, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - block_size, (batch_size,))
    rows = torch.stack([data[start : start + block_size + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/nanogpt", help="where the run is written: a new folder")
    parser.add_argument("--max_iters", type=int, default=60)
    options = parser.parse_args(argv)

    torch.manual_seed(1337)
    text = Path(__file__).read_text(encoding="utf-8")
    letters = sorted(set(text))
    data = torch.tensor([letters.index(letter) for letter in text])
    config = GPTConfig(vocab_size=len(letters))
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    gradient_accumulation_steps = 2

    watch = tt.Watch(model, options.folder, every=20, run={"recipe": {"steps": options.max_iters}})  # trimtab
    with watch:  # trimtab
        for iter_num in range(options.max_iters):
            for _ in range(gradient_accumulation_steps):
                _, loss = model(*get_batch(data, config.block_size))
                (loss / gradient_accumulation_steps).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch.step(loss)  # trimtab: the last micro-batch's loss; attention is averaged over all of them
            if watch.last.get("step") == iter_num + 1:  # trimtab: a step that was logged
                seen = watch.last  # trimtab
                print(f"iter {seen['step']}: loss {seen['loss']:.3f}, largest logit {seen['max_logit']:.2f}")  # trimtab


if __name__ == "__main__":
    main()
