"""See a model train: taps on any model, signals, alarms, the run log. Watching never changes training."""

from trimtab.watch.alarms import Alarm
from trimtab.watch.watch import Watch

__all__ = ["Alarm", "Watch"]
