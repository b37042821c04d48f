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

from collections.abc import Callable

import step_costs
import torch
import torch.nn.functional as F
from measure import paired, rows_so_far, spread, write

from trimtab.stabilizers import auxiliary_loss, stabilize_

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
    model, inputs, targets = step_costs.model_and_batch(name, quick)
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
    options = step_costs.options(__doc__)
    device, clock = options.device, options.clock
    rounds = 2 if options.quick else 8
    name = f"stabilizer_cost_{device}"
    rows = {} if options.quick or not options.resume else rows_so_far(name)
    for spec in SPECS:
        if spec not in rows:
            rows[spec] = {}
            for model in step_costs.MODELS:
                plain, stabilized = (steps_of(model, each, options.quick, device) for each in ("none", spec))
                rows[spec][model] = paired(plain, stabilized, rounds, device, clock)
            if not options.quick:
                write(name, {"clock": clock.__name__, "steps": STEPS, "rows": rows})
        print(f"{spec:24}" + "".join(f"  {model} {spread(own)}" for model, own in rows[spec].items()), flush=True)


if __name__ == "__main__":
    main()
