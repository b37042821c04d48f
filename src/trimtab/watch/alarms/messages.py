"""What an alarm says: what was seen, where, since when, how sure, and what to do next."""

import math

from trimtab.watch.alarms.records import Alarm
from trimtab.watch.alarms.thresholds import Thresholds
from trimtab.watch.signals.spectra import collapse_kind

_NEXT = {
    "entropy collapse": "Low entropy alone is not failure: heads that learn to copy one token have it too. If the loss "
    "rises or stalls, go back to a checkpoint from before, then lower the learning rate, warm it up for longer, or "
    "convert the model with tt.reparametrize_.",
    "logit growth": "Lower the learning rate or warm it up for longer; or bound the logits, with tt.reparametrize_, "
    "QK-norm or a soft cap.",
    "sigma growth": "Lower the learning rate or warm it up for longer, or hold sigma with tt.reparametrize_.",
    "large updates": "Such steps overwrite what the weights held, and the loss rises. Lower the learning rate or warm "
    "it up for longer.",
    "loss spike": "Look at this batch. If spikes come back, clip the gradients or lower the learning rate.",
    "divergence": "Stop. Go back to a checkpoint from before the loss rose and go on with half the learning rate, or "
    "convert the model with tt.reparametrize_; see in the log which head or weight moved first.",
    "dead head": "Such a head only averages, and little gradient reaches its query and key weights. If most heads are "
    "dead and the loss stalls, the signal does not get through the depth: use pre-LN, a warmup, a larger start of the "
    "query and key weights, or tt.reparametrize_.",
    "non-finite": "Stop: weights that met a NaN keep it. Go back to the last checkpoint before this step; lower the "
    "learning rate or clip the gradients; with float16 use a loss scale, or bfloat16.",
}


def message(alarm: Alarm, count: int, total: int, thresholds: Thresholds, energy: float | None) -> str:
    """The paragraph for an alarm.

    Args:
        alarm: all but its message.
        count: how many places are out of bounds, of which `alarm.where` is the worst.
        total: how many were looked at.
        thresholds: by which it was raised.
        energy: the `qk_energy` of the head in question where it is known.
    """
    seen = _seen(alarm.kind, alarm.where, alarm.value, thresholds)
    last = f", since step {alarm.since}" if alarm.since < alarm.step else ""
    others = f"; {count} of {total} are out of bounds" if total > 1 else ""
    sentences = [f"step {alarm.step}: {alarm.kind}: {seen}{last}{others}."]
    if alarm.kind == "entropy collapse" and energy is not None and not math.isnan(energy):
        sentences.append(_rank(alarm.value, energy))
    if not math.isnan(alarm.confidence):
        sentences.append(f"Of the calibration runs with this alarm {alarm.confidence:.0%} did not end well.")
    return " ".join([*sentences, _NEXT[alarm.kind]])


def _rank(entropy: float, energy: float) -> str:
    """What the head's weights say of its collapse (Qi et al., arXiv 2505.21910)."""
    benign = collapse_kind(entropy, energy, low_entropy=math.inf) == "benign"
    verdict = "many: the kind that trains on" if benign else "few: the kind that crashes"
    return f"Its query and key weights have {energy:.0%} of their energy in one direction, so they look in {verdict}."


def _seen(kind: str, where: str, value: float, thresholds: Thresholds) -> str:
    match kind:
        case "entropy collapse":
            return f"{where} has {value:.2g} of its largest entropy (bound {thresholds.collapse_entropy:g})"
        case "logit growth":
            return f"{where} has a logit of {value:.4g} (bound {thresholds.max_logit:g})"
        case "sigma growth":
            return (
                f"sigma of {where} grew {value:.3g} times within {thresholds.sigma_steps} steps "
                f"(bound {thresholds.sigma_growth:g})"
            )
        case "large updates":
            return f"one step changed {where} by {value:.0%} of its norm (bound {thresholds.update_ratio:.0%})"
        case "loss spike":
            return f"the loss jumped to {value:.4g}"
        case "divergence":
            return f"the loss has come back up to {value:.4g}"
        case "dead head":
            return f"{where} attends to every key alike (entropy {value:.4f} of its largest)"
        case _:
            return f"{where} is {value}"
