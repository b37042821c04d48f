"""`Hardware`: where a run trains. It decides how fast, not what."""

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class Hardware:
    """Where a run trains; under torchrun, on all of its processes.

    Attributes:
        accelerator: "auto" takes a GPU where there is one.
        strategy: how several processes share the work: "ddp" gives each the whole model; "fsdp" (FSDP2) gives each a
            shard of every weight; "auto" is "ddp" for several and nothing for one.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    strategy: Strategy = "auto"
