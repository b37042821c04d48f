"""A tap on the activations of a model: the residual stream after each block, and the output logits."""

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.watch.signals.activations import mean_square, mean_square_log_z
from trimtab.watch.taps.compiled import is_compiled
from trimtab.watch.taps.entries import Hook, recomputes_or_captures
from trimtab.watch.taps.forward import dotted_names

# So many forwards may hide their logits (a warmup that returns something else) before they are given up.
_FORWARDS_WITHOUT_LOGITS = 5


class ActivationReading(NamedTuple):
    """What was seen of the activations.

    Attributes:
        rms: root mean square of the output of each block, by its dotted name, in the order of the forward.
        output_z: root mean square of ``log Z`` of the model's output logits; None where they were not found.
    """

    rms: dict[str, float]
    output_z: float | None


class ActivationTap:
    """Sees the activations of a model's training forwards, from its making until `close`.

    Blocks are those `residual_blocks` finds. Logits are the output's ``logits`` (attribute or key) or else, where the
    model returns the very tensor that one of its linear layers made, alone or first in a tuple, that tensor. Several
    forwards are averaged; forwards in eval mode, without gradients or with an error, and activations recomputed in the
    backward are not counted.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self._model, self._wanted = model, wanted
        self._blocks: dict[str, nn.Module] | None = None
        self._linears: list[nn.Module] | None = None  # those whose output may be the logits; all until they were found
        self._forwards = 0  # that were looked at
        self._squares: dict[str, list[Tensor]] = {}
        self._pending: list[tuple[str, Tensor]] = []  # of the forward that is going on
        self._z_squares: list[Tensor] = []
        self._looking = False  # during a forward that is wanted
        self._made: dict[int, tuple[nn.Module, weakref.ref[Tensor]]] = {}  # outputs of linear layers, by id
        self._inside: list[RemovableHandle] = []
        self._hooks = [
            model.register_forward_pre_hook(Hook(self._enter)),
            model.register_forward_hook(Hook(self._leave), always_call=True),
        ]

    def state_dict(self) -> dict[str, Any]:
        """What later readings depend on, in plain values."""
        names = dotted_names(self._model)
        linears = None if self._linears is None else [names[id(linear)] for linear in self._linears]
        return {"forwards": self._forwards, "linears": linears}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._forwards, kept = state["forwards"], state["linears"]
        names = dotted_names(self._model)
        linears = [module for module in self._model.modules() if isinstance(module, nn.Linear)]
        self._linears = None if kept is None else [linear for linear in linears if names[id(linear)] in kept]

    def take(self) -> ActivationReading:
        """What was seen since the last time."""
        squares, self._squares = self._squares, {}
        z_squares, self._z_squares = self._z_squares, []
        rms = {name: _root_mean(found) for name, found in squares.items()}
        return ActivationReading(rms, _root_mean(z_squares) if z_squares else None)

    def close(self) -> None:
        """Remove every hook."""
        self._end()
        for hook in self._hooks:
            hook.remove()

    def _enter(self, *_: object) -> None:
        self._end()  # a forward that was interrupted by Ctrl-C has not left
        trains = self._model.training and torch.is_grad_enabled()
        if not trains or recomputes_or_captures() or not self._wanted():
            return
        if any(map(is_compiled, self._model.modules())) and not _eager_is_forced():
            return  # a hook on a part of compiled code would have it compiled again
        self._looking = True
        if self._blocks is None:
            names = dotted_names(self._model)
            self._blocks = {names[id(block)]: block for block in residual_blocks(self._model)}
        if self._linears is None:
            self._linears = [module for module in self._model.modules() if isinstance(module, nn.Linear)]
        for name, block in self._blocks.items():
            self._inside.append(block.register_forward_hook(Hook(lambda *call, name=name: self._see(name, call[-1]))))
        for linear in self._linears:
            self._inside.append(linear.register_forward_hook(Hook(self._keep)))

    def _see(self, name: str, output: Any) -> None:
        tensor = _first_tensor(output)
        square = None if tensor is None else _unless_it_fails(mean_square, tensor)
        if square is not None:
            self._pending.append((name, square))

    def _keep(self, linear: nn.Module, _: object, output: Any) -> None:
        if isinstance(output, Tensor):
            self._made[id(output)] = linear, weakref.ref(output)  # weak: nothing lives longer for being watched

    def _leave(self, _module: nn.Module, _args: object, output: Any) -> None:
        if self._looking and output is not None:  # it has not raised
            for name, found in self._pending:
                self._squares.setdefault(name, []).append(found)
            logits, maker = self._logits(output)
            self._forwards += 1
            if maker is not None:
                self._linears = [maker]  # who else to ask in the forwards to come
            elif self._forwards >= _FORWARDS_WITHOUT_LOGITS:
                self._linears = []
            square = None if logits is None else _unless_it_fails(mean_square_log_z, logits)
            if square is not None:
                self._z_squares.append(square)
        self._end()

    def _logits(self, output: Any) -> tuple[Tensor | None, nn.Module | None]:
        """The logits in a model's output, and the linear layer that made them where only that tells."""
        named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(named, Tensor):
            return named, None
        first = _first_tensor(output)
        linear, made = self._made.get(id(first), (None, None))
        return (first, linear) if made is not None and made() is first else (None, None)

    def _end(self) -> None:
        self._looking = False
        handles, self._inside = self._inside, []
        for handle in handles:
            handle.remove()
        self._made.clear()
        self._pending.clear()


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, in its order: what follows one another in its outermost lists of layers.

    These are the children of the outermost nn.ModuleList and nn.Sequential that hold attention; where no module is
    named after attention, of those that hold several modules of one class which have modules of their own.
    """
    return _outermost(model, _with_attention) or _outermost(model, _repeated)


def _outermost(module: nn.Module, choose: Callable[[nn.Module], list[nn.Module]]) -> list[nn.Module]:
    chosen = choose(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    return chosen or [block for child in module.children() for block in _outermost(child, choose)]


def _with_attention(container: nn.Module) -> list[nn.Module]:
    having = [child for child in container.children() if any(map(_is_named_attention, child.modules()))]
    if isinstance(container, nn.ModuleList):
        return list(container.children()) if having else []
    return having if len(having) > 1 else []  # a Sequential may also be an embedding, one whole encoder and a head


def _is_named_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _repeated(container: nn.Module) -> list[nn.Module]:
    composite = [child for child in container.children() if any(child.children())]
    kinds = [type(child) for child in composite]
    return [child for child in composite if kinds.count(type(child)) > 1]


def _first_tensor(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def _unless_it_fails(measure: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    """The number, or None of a tensor that has none (sharded, nested, of integers): training goes on."""
    try:
        return measure(tensor)
    except (RuntimeError, ValueError, TypeError):
        return None


def _root_mean(squares: list[Tensor]) -> float:
    return torch.stack(squares).mean().sqrt().item()


def _eager_is_forced() -> bool:
    """Whether compiled code runs in eager mode for a while, as it does when a compiled model is looked at."""
    frames = sys.modules.get("torch._dynamo.eval_frame")  # torch 2.6 to 2.13 keep it there
    return getattr(getattr(frames, "_stance", None), "stance", "default") == "force_eager"
