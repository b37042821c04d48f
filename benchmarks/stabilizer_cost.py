"""What the stabilizers of attention and logits cost: whole training steps, with and without each, in turn.

    python benchmarks/stabilizer_cost.py            # about five minutes on 2 cores
    python benchmarks/stabilizer_cost.py --resume   # only the rows that are missing
    python benchmarks/stabilizer_cost.py --busy     # one thread, processor time: on a machine with other work
    python benchmarks/stabilizer_cost.py --quick    # does it run? some seconds, no numbers worth keeping

A step is forward, loss (with what z-loss adds), backward and fused AdamW, on data made before. Both models start from
the same weights. Printed is the median of the paired ratios with / without, smallest and largest beside it, for

  ViT    the digits ViT of `trimtab train vit-digits`: 0.2 million parameters, batch 64, 16 tokens
  GPT    4 blocks, 256 wide, 4 heads, 4 texts of 128 tokens, 512 words: 3.5 million parameters

Writes results/stabilizer_cost_cpu.json or _cuda.json.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from measure import paired, rows_so_far, spread, write
from watch_cost import GPT

from trimtab.models.vit import ViT
from trimtab.stabilizers import auxiliary_loss, stabilize_
from trimtab.tasks.images import vit_digits

SPECS = (
    "qk-norm",
    "qk-norm:norm=rms",
    "softcap:logits=none",
    "softcap:attention=none",
    "qk-clip",
    "qk-clip:every=10",
    "z-loss",
)
STEPS = 10  # timed together, so that one of them is an `every=10`th


def steps_of(name: str, spec: str, quick: bool, device: str) -> Callable[[], None]:
    """What takes some steps of a model with a stabilizer."""
    torch.manual_seed(0)
    if name == "ViT":
        config = vit_digits().model
        model = ViT(replace(config, depth=1) if quick else config)
        inputs, targets = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    else:
        context, width, depth = (32, 64, 1) if quick else (128, 256, 4)
        model = GPT(512, context, width, depth, heads=4)
        inputs, targets = torch.randint(512, (4, context)), torch.randint(512, (4 * context,))
    stabilize_(model, spec).to(device)
    inputs, targets = inputs.to(device), targets.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def steps() -> None:
        for _ in range(STEPS):
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets)
            added = auxiliary_loss(model)
            optimizer.zero_grad()
            (loss if added is None else loss + added).backward()
            optimizer.step()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, two rounds, nothing written")
    parser.add_argument("--resume", action="store_true", help="only the rows that are missing")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    options = parser.parse_args()
    if options.busy:
        torch.set_num_threads(1)
    clock = time.process_time if options.busy else time.perf_counter
    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = 2 if options.quick else 8
    name = f"stabilizer_cost_{device}"
    rows = {} if options.quick or not options.resume else rows_so_far(name)
    for spec in SPECS:
        if spec not in rows:
            rows[spec] = {}
            for model in ("ViT", "GPT"):
                plain, stabilized = (steps_of(model, each, options.quick, device) for each in ("none", spec))
                rows[spec][model] = paired(plain, stabilized, rounds, device, clock)
            if not options.quick:
                write(name, {"clock": clock.__name__, "steps": STEPS, "rows": rows})
        print(f"{spec:24}" + "".join(f"  {model} {spread(own)}" for model, own in rows[spec].items()), flush=True)


if __name__ == "__main__":
    main()
