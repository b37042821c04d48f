"""What benchmarks of the cost of a step share: two models with a batch, and their options."""

import argparse
import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from watch_cost import GPT

from trimtab.models.vit import ViT
from trimtab.tasks.images import vit_digits

MODELS = ("ViT", "GPT")


def model_and_batch(name: str, quick: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, its inputs and its classes, the same in every call.

    ViT: the digits ViT of `trimtab train vit-digits`: 0.2 million parameters, batch 64, 16 tokens. GPT: 4 blocks, 256
    wide, 4 heads, 4 texts of 128 tokens, 512 words: 3.5 million parameters. With `quick`, smaller ones.
    """
    torch.manual_seed(0)
    if name == "ViT":
        config = vit_digits().model
        model: nn.Module = ViT(replace(config, depth=1) if quick else config)
        return model, torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    context, width, depth = (32, 64, 1) if quick else (128, 256, 4)
    model = GPT(512, context, width, depth, heads=4)
    return model, torch.randint(512, (4, context)), torch.randint(512, (4 * context,))


def options(doc: str | None) -> argparse.Namespace:
    """The options --quick, --resume and --busy; and what follows of them: `clock` and `device`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, two rounds, nothing written")
    parser.add_argument("--resume", action="store_true", help="only the rows that are missing")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    found = parser.parse_args()
    if found.busy:
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found.clock = time.process_time if found.busy else time.perf_counter
    found.device = "cuda" if torch.cuda.is_available() else "cpu"
    return found
