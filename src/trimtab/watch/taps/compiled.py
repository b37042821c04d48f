"""Compiled models: one more forward, eager and without a trace, through which their attention is seen.

The compiled call itself is left alone: nothing in it changes from step to step, so nothing is compiled again.
"""

import copy
import gc
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from trimtab.watch import kept
from trimtab.watch.taps import flex


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this very module runs compiled code: after `torch.compile(module)` or `module.compile()`."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether the model is compiled, or some part of it, or a function in the files that define its classes."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if not _is_torch(cls.__module__)}
    files = {cls.__module__ for cls in classes}
    spaces = [*map(vars, classes), *(vars(sys.modules[file]) for file in files if file in sys.modules)]
    return any(is_compiled(module) for module in model.modules()) or any(
        _is_compiled_function(value) for space in spaces for value in list(space.values())
    )


def wrappers(model: nn.Module) -> list[nn.Module]:
    """What `torch.compile(model)` has returned and is still in use; looks through all objects, tens of milliseconds."""
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    if kind is None:
        return []
    instances = [found for found in gc.get_referrers(kind) if type(found) is kind]
    return [wrapper for wrapper in instances if _is_around(wrapper, model)]


def _is_around(wrapper: Any, model: nn.Module) -> bool:
    inner = wrapper._modules.get("_orig_mod")
    return inner is model or getattr(inner, "_modules", {}).get("module") is model  # data parallel between them


def run_unnoticed(run: Callable[..., object], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a forward in eager mode so that the program cannot tell.

    Random states, buffers, attributes of modules that are numbers or tensors, and the inputs stay as they are. What
    a forward does besides is done: lists it appends to, lines it prints.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        tensors = [*model.parameters(), *model.buffers(), *_tensors((args, kwargs))]
        stack.enter_context(kept.random_states_kept(tensors))
        stack.enter_context(kept.modules_kept(model))
        args, kwargs = _copied((args, kwargs))
        run(*args, **kwargs)


def _is_torch(module_name: str) -> bool:
    return module_name.split(".")[0] in ("torch", "builtins")


def _is_compiled_function(value: object) -> bool:
    """flex_attention apart: called compiled by eager code, it is seen where it is called."""
    if type(value) is not FunctionType:
        return False
    inner = getattr(value, "_torchdynamo_orig_callable", None)
    return inner is not None and inner not in flex.functions()


def _tensors(inputs: object) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _copied(inputs: Any) -> Any:
    """The inputs with copies in the place of tensors, and of objects that may hold some: a cache, say."""
    copies: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return kept.copied(leaf, copies)
        return leaf if isinstance(leaf, nn.Module) else copy.deepcopy(leaf, copies)

    return _pytree.tree_map(copied, inputs)
