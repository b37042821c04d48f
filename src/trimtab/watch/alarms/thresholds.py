"""The numbers that alarms are decided by, and where they come from."""

import math
from dataclasses import dataclass, fields

KINDS = (
    "entropy collapse",
    "logit growth",
    "sigma growth",
    "large updates",
    "loss spike",
    "divergence",
    "dead head",
    "non-finite",
)

CONFIDENCE = {
    "entropy collapse": 0.91,
    "logit growth": 0.97,
    "sigma growth": 0.97,
    "large updates": 0.96,
    "loss spike": 0.92,
    "divergence": 0.86,
    "dead head": 0.93,
}
"""Of the runs of benchmarks/alarms.py with an alarm of a kind, how many did not end healthy: (n + 1) / (raised + 2)."""


@dataclass(frozen=True)
class Thresholds:
    """When each alarm is raised. None switches an alarm off.

    Those marked "fitted" come from benchmarks/alarms.py, which is also where to fit them to runs of another kind;
    docs/alarms.md has its tables. "Chosen" ones are plain choices that were tested there but not fitted.

    Attributes:
        collapse_entropy: a head has collapsed when its normalised entropy (0 to 1) is below this. Fitted.
        collapse_share: "entropy collapse" is raised when this share of the heads has collapsed; a few of many are
            found in healthy runs. Chosen.
        max_logit: "logit growth" is raised for a head whose largest attention logit is above this. Fitted.
        sigma_growth: a weight grows too fast when within `sigma_steps` steps sigma becomes this many times larger; of a
            converted weight it is abs(gamma) that counts, the spectral norm of the weight in use. Fitted. Sigma below 1
            counts as 1: such a weight shrinks its input, and that it grows to 1 is learning.
        sigma_steps: that number of steps, not of logged lines. Chosen.
        sigma_share: "sigma growth" is raised when this share of the weights grows too fast. Chosen.
        update_ratio: an update is too large when one step changes a weight by more than this share of its norm; of
            converted weights it does not count, as their size is no matter. Fitted.
        update_share: "large updates" is raised when, while the loss rises, more than this share of the weights has too
            large a one on `lines` logged steps running; more than half, since weights that begin at zero (half of
            LoRA's) grow many times over at first. Chosen.
        spike_score: "loss spike" is raised when the loss lies above the median of the `spike_lines` losses before it by
            more than this many of their robust standard deviations (`trimtab.watch.signals.losses.spike_score`), and
        spike_rise: by more than this share of the span, the way from the first loss down to the lowest. Both chosen.
        spike_lines: how many logged losses are looked back on. Chosen.
        divergence_rise: "divergence" is raised when the median of the last five logged losses lies above the lowest
            such median by this share of the span. Chosen.
        dead_entropy: a head is dead when its normalised entropy is above this: it attends to every key alike. Chosen.
        dead_share: "dead head" is raised when, while neither the loss falls nor the learning rate rises, this share of
            the heads has been dead for `dead_lines`; where as many were dead on the first line, as with small weights,
            for `dead_lines_one`. Chosen.
        dead_lines: logged steps running after which it is raised for that share of the heads. Fitted.
        dead_lines_one: logged steps running after which it is raised for any one head. Chosen.
        loss_change: the loss rises, or falls, when over the last `spike_lines` logged losses (as many as there are) it
            moves by more than this share of the span: from the median of the older half to that of the newer. Chosen.
        lines: logged steps running for which a head or a weight must be out of bounds, since one batch proves little.
            Chosen.

    Raises:
        ValueError: a number out of range.
    """

    collapse_entropy: float | None = 0.02
    collapse_share: float = 0.5
    max_logit: float | None = 1500.0
    sigma_growth: float | None = 3.5
    sigma_steps: int = 50
    sigma_share: float = 0.5
    update_ratio: float | None = 0.1
    update_share: float = 0.5
    spike_score: float | None = 8.0
    spike_rise: float = 0.2
    spike_lines: int = 20
    divergence_rise: float | None = 0.5
    dead_entropy: float | None = 0.9999
    dead_share: float = 0.5
    dead_lines: int = 10
    dead_lines_one: int = 50
    loss_change: float = 0.05
    lines: int = 2

    def __post_init__(self) -> None:
        shares = ("collapse_entropy", "collapse_share", "sigma_share", "update_share", "dead_entropy", "dead_share")
        counts = ("sigma_steps", "spike_lines", "dead_lines", "dead_lines_one", "lines")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and "None" in str(field.type):
                continue
            low, high = (1, math.inf) if field.name in counts else (0, 1 if field.name in shares else math.inf)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"expected {low} <= {field.name} <= {high}, got {value!r}")
