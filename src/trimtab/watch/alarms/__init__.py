"""Alarms: what a reader of the log should look at, how sure it is, and what to do about it."""

from trimtab.watch.alarms.machine import Alarms
from trimtab.watch.alarms.records import Alarm, Head, Reading
from trimtab.watch.alarms.thresholds import CONFIDENCE, KINDS, Thresholds

__all__ = ["CONFIDENCE", "KINDS", "Alarm", "Alarms", "Head", "Reading", "Thresholds"]
