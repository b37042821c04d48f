"""See a model train: taps on any model, signals, alarms, the run log. Watching never changes training."""

from trimtab.watch.alarms import Alarm, Thresholds
from trimtab.watch.observe import observe
from trimtab.watch.watch import Sink, Watch

__all__ = ["Alarm", "Sink", "Thresholds", "Watch", "observe"]
