"""What QK-Clip does in a model: it looks at the attention, and scales weights after an optimiser's step."""

import warnings
import weakref
from collections.abc import Set
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from trimtab.errors import ConversionError
from trimtab.reparam.heads import Projections
from trimtab.stabilizers.head_scaling import scalable_attentions, shrink_logits_, wanted_shrinking
from trimtab.stabilizers.max_logits import MaxLogits
from trimtab.watch.coverage import ROOT

# A layer may rest for some steps; after so many in a row, something is wrong.
_PATIENCE = 5
# The buffer of the model that counts the steps of each attention's weights, where not every one is followed by a clip.
_STEPS = "qk_clip_steps"


class Clipper:
    """The forward pre-hook by which a model has QK-Clip: looks at its attention, and scales after a step.

    It goes along when the model is copied or pickled; what it has seen stays behind.
    """

    def __init__(self, model: nn.Module, tau: float, every: int) -> None:
        self.model, self.tau, self.every = model, tau, every
        self._start()

    def _start(self) -> None:
        self._tap: MaxLogits | None = None
        self._attentions: list[Projections] = []
        self._steps: list[int] | None = None  # that each attention's weights have taken; None is: as the buffer says
        self._seen: dict[int, Tensor] = {}  # largest logits of an attention, (heads,), since its last clip
        self._in_vain: list[int] = []  # how often in a row each should have been clipped and was not seen
        self._forwards = 0  # that were trained on
        self._stepped_at: list[int] = []  # how many there were at the last step of each attention
        self.number = next(_numbers)
        _clippers.add(self)
        _have_steps_followed()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin to look at a model, if that has not begun: a copy is not whole when it is made."""
        if not torch.compiler.is_compiling() and self._tap is None:
            self.look().begin(args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: the model is, by then, the copy's own."""
        return {"model": self.model, "tau": self.tau, "every": self.every}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()

    def look(self) -> MaxLogits:
        """Begin to look, if that has not begun; return the tap."""
        if self._tap is None:
            self._attentions = scalable_attentions(self.model)  # what was applied since may stand in the way
            self._tap = MaxLogits(self.model, self._wanted)
            self._in_vain, self._stepped_at = ([0] * len(self._attentions) for _ in range(2))
        return self._tap

    def _wanted(self) -> bool:
        self._forwards += 1
        return any(step % self.every == 0 for step in self._counts())

    def _counts(self) -> list[int]:
        """The steps so far; read from the buffer once, since to read it is to wait for the device."""
        if self._steps is None:
            buffer = self.model.get_buffer(_STEPS) if self.every > 1 else None
            self._steps = [0] * len(self._attentions) if buffer is None else buffer.tolist()
        return self._steps

    def count_as_loaded(self) -> None:
        """Go on from the steps that a state dict has brought."""
        self._steps = None

    def after_step(self, held: Set[int]) -> None:
        """Clip the weights that have just taken a step.

        Args:
            held: ids of the optimiser's parameters.
        """
        if self not in self.model.__dict__.get("_forward_pre_hooks", {}).values():  # taken off, or a copy that failed
            return
        if self._tap is None and held.isdisjoint(map(id, self.model.parameters())):  # an average of weights, say
            return
        tap, steps = self.look(), self._counts()
        stepped = [i for i, each in enumerate(self._attentions) if not held.isdisjoint(map(id, _weights(each)))]
        due = [i for i in stepped if steps[i] % self.every == 0]
        for i in stepped:
            if self._stepped_at[i] == self._forwards:  # an optimiser around the one that took this step already
                continue
            self._stepped_at[i] = self._forwards
            steps[i] += 1
            if self.every > 1:
                self.model.get_buffer(_STEPS)[i] += 1
        if not due:
            return
        self._take_in(tap)
        largest = [self._seen.pop(i, None) for i in due]
        for i, seen in zip(due, largest, strict=True):
            self._in_vain[i] = self._in_vain[i] + 1 if seen is None else 0
        self._warn_of_unseen(tap, due)
        everywhere = _of_all_processes([self._attentions[i] for i in due], largest)
        for i, max_logits in zip(due, everywhere, strict=True):
            shrink_logits_(self._attentions[i], wanted_shrinking(max_logits, self.tau))

    def _take_in(self, tap: MaxLogits) -> None:
        """Keep what the tap has seen, by the attention module in or below which it was called."""
        names = {each.name: i for i, each in enumerate(self._attentions)}
        for name, max_logits in tap.take_maxima().items():
            holder = name.partition("#")[0].replace(ROOT, "")
            while holder and holder not in names:
                holder = holder.rpartition(".")[0]
            i = names.get(holder)
            if i is not None and len(max_logits) == self._attentions[i].query.heads:
                self._seen[i] = torch.fmax(self._seen[i], max_logits) if i in self._seen else max_logits

    def _warn_of_unseen(self, tap: MaxLogits, due: list[int]) -> None:
        names = [self._attentions[i].name for i in due if self._in_vain[i] == _PATIENCE]
        if names:
            reasons = tap.coverage().unseen
            why = next((f" ({reasons[name]})" for name in names if name in reasons), "")
            warnings.warn(
                f"qk-clip has not seen the attention of {', '.join(names) or 'the model'} in {_PATIENCE} steps{why}, "
                "and clips nothing there: trimtab.Watch(model, ...).coverage() tells what can be seen",
                stacklevel=2,
            )


def clip_after_steps_(model: nn.Module, tau: float, every: int) -> None:
    """Have the heads of a model clipped after every so many steps of its optimisers.

    Raises:
        ConversionError: see `scalable_attentions`.
    """
    attentions = scalable_attentions(model)
    model.register_forward_pre_hook(Clipper(model, tau, every), with_kwargs=True)
    if every > 1:
        steps = torch.zeros(len(attentions), dtype=torch.int64)
        model.register_buffer(_STEPS, steps.to(next(model.parameters()).device))
        model.register_load_state_dict_post_hook(_count_as_loaded)


def see_compiled_(model: nn.Module) -> None:
    """Let QK-Clip, if a model has it, see the very first forward of the model that has just been compiled.

    Without this call, only the second one is seen.
    """
    clipper = clipper_of(model)
    if clipper is not None:
        clipper.look().renew()


def clipper_of(model: nn.Module) -> Clipper | None:
    """Return what clips a model, if anything does."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Clipper)), None)


def refuse_clipped(model: nn.Module, because: str) -> None:
    """Raise a ConversionError if a model has QK-Clip."""
    if clipper_of(model) is not None:
        raise ConversionError(f"the model has qk-clip, {because}")


def _count_as_loaded(model: nn.Module, incompatible_keys: Any) -> None:
    clipper = clipper_of(model)
    if clipper is not None:
        clipper.count_as_loaded()


_clippers: weakref.WeakSet[Clipper] = weakref.WeakSet()
_numbers = count()
_hook: Any = None


def _have_steps_followed() -> None:
    global _hook
    if _hook is None:
        # A compiled step calls it too; it is no work for a compiler.
        _hook = register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _clippers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for clipper in sorted(_clippers, key=lambda clipper: clipper.number):  # the same order in every process
            clipper.after_step(held)


def _weights(attention: Projections) -> list[Tensor]:
    """The parameters whose step is followed by a clip; both make the logits larger."""
    rows = (attention.query, attention.key)
    weights = (each.layer._parameters.get(each.weight_name) for each in rows)
    return [weight for weight in weights if weight is not None]


def _of_all_processes(attentions: list[Projections], largest: list[Tensor | None]) -> list[Tensor]:
    """The largest logits of each attention, (heads,), among all processes; -inf where none was seen.

    Every process asks after every step, for the same attentions.
    """
    weight = _weights(attentions[0])[0]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    parts = [
        torch.full((each.query.heads,), -torch.inf, dtype=dtype, device=weight.device)
        if seen is None
        else seen.to(weight.device, dtype).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        for each, seen in zip(attentions, largest, strict=True)
    ]
    together = torch.cat(parts)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(together, dist.ReduceOp.MAX)
    return list(together.split([len(part) for part in parts]))
