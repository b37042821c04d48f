"""A tap on the attention of a model: every call, by the module that makes it, without touching it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from trimtab.watch.signals import HeadStats, head_stats, merge

ROOT = "(root)"


class AttentionTap:
    """Sees the attention calls of a model's training forwards, from its making until `close`.

    What it sees are calls of `torch.nn.functional.scaled_dot_product_attention` in eager mode, those inside
    `nn.MultiheadAttention` included. A call belongs to the innermost module that makes it; the second call of the
    same module in one forward is called "name#2". Forwards in eval mode and activations recomputed in the
    backward are not counted.

    Attributes:
        unseen: why the attention of a module, by dotted name, could not be seen.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[], bool]) -> None:
        self.unseen: dict[str, str] = {}
        self._model, self._wanted = model, wanted
        self._calls: dict[str, list[HeadStats]] = {}
        self._mode: _AttentionMode | None = None
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._enter)),
            model.register_forward_hook(_Hook(self._leave), always_call=True),
        ]

    def take(self) -> dict[str, HeadStats]:
        """What was seen since the last time, by module name, in the order of the first forward."""
        calls, self._calls = self._calls, {}
        # A module whose number of heads changes between forwards is reported with the number it began with.
        return {
            name: merge([stats for stats in found if len(stats.entropy) == len(found[0].entropy)])
            for name, found in calls.items()
        }

    def close(self) -> None:
        """Remove every hook."""
        self._leave()
        for hook in self._hooks:
            hook.remove()

    def _enter(self, *_: object) -> None:
        self._leave()  # a forward that was interrupted by Ctrl-C has not left
        # Inside a backward this is a recomputation for activation checkpointing, seen already.
        recomputes = torch._C._current_graph_task_id() != -1
        if not self._model.training or recomputes or not self._wanted():
            return
        if _is_compiled(self._model):
            self.unseen[ROOT] = "the model, or a part of it, is compiled; attention is seen in eager mode only"
            return
        self._mode = _AttentionMode(self._model, self._calls, self.unseen)
        self._mode.__enter__()

    def _leave(self, *_: object) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)


class _Hook:
    """A hook that compiled code does not see, and that stays behind when the model is copied or pickled."""

    def __init__(self, call: Callable[..., None] | None) -> None:
        self.call = call

    def __call__(self, *args: object) -> None:
        if self.call is not None and not torch.compiler.is_compiling():
            self.call(*args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[None]]:
        return _Hook, (None,)


class _AttentionMode(TorchFunctionMode):
    """Active during one forward of the root: records attention calls, lets everything pass unchanged."""

    def __init__(self, model: nn.Module, calls: dict[str, list[HeadStats]], unseen: dict[str, str]) -> None:
        super().__init__()
        self._calls, self._unseen = calls, unseen
        self._names = {module: name or ROOT for name, module in model.named_modules()}
        self._inside = [model]  # the modules whose forward is running, outermost first
        self._count: Counter[str] = Counter()
        self._before: dict[nn.Module, int] = {}  # attention calls seen when a module's forward began

    def __enter__(self) -> "_AttentionMode":
        self._hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for hook in self._hooks:
            hook.remove()

    def _enter_module(self, module: nn.Module, _: object) -> None:
        if module in self._names:
            self._inside.append(module)
            self._before[module] = self._count.total()

    def _leave_module(self, module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.MultiheadAttention) and self._before.get(module) == self._count.total():
            self._unseen[self._names[module]] = "it returns its weights; call it with need_weights=False"
        if module in self._inside:  # down to it, should an inner one have been interrupted
            while self._inside.pop() is not module:
                pass

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and not torch.compiler.is_compiling():
            # torch hands over the whole function, and this mode is off inside it.
            with self._seen_inside():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
            self._record(*args, **kwargs)
        return result

    @contextmanager
    def _seen_inside(self) -> Iterator[None]:
        attention = F.scaled_dot_product_attention

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            result = attention(*args, **kwargs)
            self._record(*args, **kwargs)
            return result

        F.scaled_dot_product_attention = recorded
        try:
            yield
        finally:
            F.scaled_dot_product_attention = attention

    def _module_name(self) -> str:
        return self._names[self._inside[-1]] if self._inside else ROOT

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        name = self._module_name()
        self._count[name] += 1
        if self._count[name] > 1:
            name = f"{name}#{self._count[name]}"
        try:
            stats = head_stats(
                _as_used(query.detach()),
                _as_used(key.detach()),
                attn_mask=attn_mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        except Exception as error:  # whatever it is, training goes on: the model's own call went well
            self._unseen[name] = str(error)
        else:
            self._calls.setdefault(name, []).append(stats)


def _as_used(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which autocast, if it is on, lets attention see it."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules())
