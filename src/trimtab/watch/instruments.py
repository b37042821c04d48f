"""All that looks at one model: every tap and tracker, asked once a logged step."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from trimtab.reparam import sigma_error, sigma_gamma, stable_ranks
from trimtab.watch.alarms import Head, Reading
from trimtab.watch.coverage import ROOT
from trimtab.watch.reduce import Sight
from trimtab.watch.signals import HeadStats, SigmaTracker, embedding_variability, plain_weights, qk_energies
from trimtab.watch.taps import ActivationTap, AttentionTap, GradientTap, OptimizerTap
from trimtab.watch.taps.forward import plain_name

logger = logging.getLogger("trimtab")

# Signals that are told of weights or modules by name.
_BY_NAME = {"sigma", "gamma", "stable_rank", "grad_variance", "update_ratio", "tev", "sigma_error", "qk_energy"}


class Instruments:
    """Looks at a model from its making until `close`.

    A signal that fails is absent, with one warning: training goes on.

    Args:
        model: any model.
        wanted: whether the step that is going on will be logged.
        wanted_slow: the same for the signals that have a slower cadence of their own.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool], wanted_slow: Callable[[], bool]) -> None:
        self._model = model
        self._sigmas = SigmaTracker()
        self._failed: set[str] = set()
        with ExitStack() as opening:  # an error on the way leaves nothing behind
            self.attention = AttentionTap(model, wanted)
            opening.callback(self.attention.close)
            self._optimizer = OptimizerTap(model, wanted)
            opening.callback(self._optimizer.close)
            self._activations = ActivationTap(model, wanted)
            opening.callback(self._activations.close)
            self._gradients = GradientTap(model, wanted_slow)
            opening.callback(self._gradients.close)
            self._open = opening.pop_all()

    def close(self) -> None:
        """Remove every hook."""
        self._open.close()

    def state_dict(self) -> dict[str, Any]:
        """What is remembered from one logged step to the next: plain values and tensors."""
        return {"sigmas": self._sigmas.state_dict(), "activations": self._activations.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._sigmas.load_state_dict(state["sigmas"])
        self._activations.load_state_dict(state["activations"])

    def take(self, slow: bool) -> Sight:
        """What this process saw since the last time; what was not seen is absent."""
        line: dict[str, Any] = {}
        plain = plain_name(self._model)
        readings: dict[Head, Reading] = {}
        with self._unless_it_fails("attention"):
            readings |= _readings(self.attention.take())
        with self._unless_it_fails("optimizer"):
            optimizer = self._optimizer.take()
            if optimizer is not None:
                line |= optimizer._asdict()
        with self._unless_it_fails("sigma"):
            line |= self._weights(exact=slow)
        with self._unless_it_fails("tev"):
            line["tev"] = {name: list(tev) for name, tev in embedding_variability(self._model).items()}
        with self._unless_it_fails("activation_rms"):
            line["activation_rms"], line["output_z"] = self._activations.take()
        micro_batches = None
        with self._unless_it_fails("grad_noise"):
            micro_batches = self._gradients.take()
        if slow:
            with self._unless_it_fails("sigma_error"):
                line["sigma_error"] = {name: errors.tolist() for name, errors in sigma_error(self._model).items()}
            with self._unless_it_fails("qk_energy"):
                counted = Counter(head.module for head in readings)
                names = [name for name, _ in self._model.named_modules()]
                heads = {name: counted[plain(name) or ROOT] for name in names if (plain(name) or ROOT) in counted}
                line["qk_energy"] = qk_energies(self._model, heads)
        for signal in _BY_NAME & set(line):
            line[signal] = {plain(name) or ROOT: value for name, value in line[signal].items()}
        seen = {name: value for name, value in line.items() if value is not None and value != {}}
        return Sight(seen, readings, [] if micro_batches is None else [micro_batches])

    def _weights(self, exact: bool) -> dict[str, Any]:
        """Sigma and stable rank of every weight; gamma of those that are converted."""
        converted = sigma_gamma(self._model)
        plain = self._sigmas.read(plain_weights(self._model, converted), exact=exact)
        in_use = {name: sigmas for name, (sigmas, _) in converted.items()}
        ranks = {name: values.tolist() for name, values in stable_ranks(self._model, in_use).items()}
        return {
            "sigma": {name: sigmas.tolist() for name, sigmas in in_use.items()} | plain.sigma,
            "gamma": {name: gammas.tolist() for name, (_, gammas) in converted.items()},
            "stable_rank": ranks | {name: [value] for name, value in plain.stable_rank.items()},
        }

    @contextmanager
    def _unless_it_fails(self, signal: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: the model's own step went well
            if signal not in self._failed:
                self._failed.add(signal)
                logger.warning("%s cannot be measured, and is missing from the log: %s", signal, error)


def _readings(stats: dict[str, HeadStats]) -> dict[Head, Reading]:
    """One reading per head, in the order of the forward."""
    return {
        Head(name, head): Reading(*numbers)
        for name, heads in stats.items()
        for head, numbers in enumerate(zip(*torch.stack(tuple(heads)).tolist(), strict=True))
    }
