"""What a step of SAM costs: whole training steps with it and with its inner optimiser alone, in turn.

    python benchmarks/sam_cost.py            # about five minutes on 2 cores
    python benchmarks/sam_cost.py --resume   # only the rows that are missing
    python benchmarks/sam_cost.py --busy     # one thread, processor time: on a machine with other work
    python benchmarks/sam_cost.py --quick    # does it run? some seconds, no numbers worth keeping

A step is forward, loss, backward and fused AdamW, on data made before; SAM's is twice the forward and backward, and the
climb between. Both models start from the same weights. Printed is the median of the paired ratios, smallest and largest
beside it, which should be at most 2.05. For scale, the SAM and ASAM of pytorch-optimizer around the same AdamW, and two
plain backwards before one step of AdamW: what cannot be saved.

  ViT    the digits ViT of `trimtab train vit-digits`: 0.2 million parameters, batch 64, 16 tokens
  GPT    4 blocks, 256 wide, 4 heads, 4 texts of 128 tokens, 512 words: 3.5 million parameters

Writes results/sam_cost_cpu.json or _cuda.json.
"""

import statistics
from collections.abc import Callable
from functools import partial

import step_costs
import torch
import torch.nn.functional as F
from measure import paired, rows_so_far, spread, write
from torch import Tensor

import trimtab as tt

LIMIT = 2.05
LR = 1e-4
OURS = ("SAM", "ASAM")
ARMS = ("two backwards", *OURS, "pytorch-optimizer SAM", "pytorch-optimizer ASAM")


def steps_of(name: str, arm: str, quick: bool, device: str, steps: int) -> Callable[[], None]:
    """What takes some steps of a model with a way to train it; "AdamW" is the plain one."""
    model, inputs, targets = step_costs.model_and_batch(name, quick)
    model.to(device)
    inputs, targets = inputs.to(device), targets.to(device)
    base = partial(torch.optim.AdamW, fused=True)
    parameters = list(model.parameters())

    def backward() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets)
        loss.backward()
        return loss

    if arm in OURS:
        ours = (tt.SAM if arm == "SAM" else tt.ASAM)(parameters, base, lr=LR)
        optimizer: torch.optim.Optimizer = ours
        step = partial(ours.step, backward)
    elif arm.startswith("pytorch-optimizer"):
        from pytorch_optimizer import SAM

        optimizer = SAM(parameters, base, rho=0.05, adaptive=arm.endswith("ASAM"), lr=LR)
        step = partial(optimizer.step, backward)
    else:
        optimizer = base(parameters, lr=LR)
        step = optimizer.step
    # pytorch-optimizer's closure form leaves the first backward to its caller.
    before = 0 if arm in OURS else 2 if arm == "two backwards" else 1

    def take() -> None:
        for _ in range(steps):
            for _ in range(before):
                backward()
            step()

    return take


def main() -> None:
    options = step_costs.options(__doc__)
    device, clock = options.device, options.clock
    rounds, steps = (2, 2) if options.quick else (12, 10)
    name = f"sam_cost_{device}"
    rows = {} if options.quick or not options.resume else rows_so_far(name)
    print(f"step / step of AdamW, target for ours at most {LIMIT}")
    for arm in ARMS:
        if arm not in rows:
            rows[arm] = {}
            for model in step_costs.MODELS:
                plain, other = (steps_of(model, each, options.quick, device, steps) for each in ("AdamW", arm))
                rows[arm][model] = paired(plain, other, rounds, device, clock)
            if not options.quick:
                write(name, {"clock": clock.__name__, "limit": LIMIT, "steps": steps, "rows": rows})
        verdict = ""
        if arm in OURS:
            reached = all(statistics.median(own) <= LIMIT for own in rows[arm].values())
            verdict = "  reached" if reached else "  missed"
        print(
            f"{arm:24}" + "".join(f"  {model} {spread(own)}" for model, own in rows[arm].items()) + verdict, flush=True
        )


if __name__ == "__main__":
    main()
