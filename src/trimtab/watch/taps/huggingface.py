"""The tap on Hugging Face models with `attn_implementation="eager"`.

Their attention modules call a function `eager_attention_forward` of the file that defines them, by itself or through
transformers' attention registry. The registry's other entries lead to `scaled_dot_product_attention`,
`flex_attention` or flash-attn, which have taps of their own. transformers is never imported here.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.watch.signals import HeadStats, head_stats
from trimtab.watch.taps.backend import BackEnd, Call, NotMeasuredError, as_attention_sees

_NAME = "eager_attention_forward"
# Weights of the first queries of the first example are compared with those the function returned.
_QUERIES_CHECKED = 64
# Half the sum of the differences of two rows of weights, averaged: rounding in bfloat16 stays far below.
_FURTHEST = 0.05


def functions(model: nn.Module) -> list[Callable[..., Any]]:
    """The eager attention functions of the files that define the model's classes."""
    files = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    found = (vars(sys.modules[file]).get(_NAME) for file in files if file in sys.modules)
    return [function for function in found if callable(function)]


def _measure(call: Call) -> HeadStats:
    given = call.arguments()
    query, key, mask = given["query"], given["key"], given.get("attention_mask")
    if given.get("s_aux") is not None:
        raise NotMeasuredError("it has attention sinks (s_aux), which take part in the softmax")
    if mask is not None and not mask.is_floating_point():
        raise NotMeasuredError(f"its mask is {mask.dtype}, and what eager attention makes of that is its own affair")
    position_bias = given.get("position_bias")
    if mask is not None:
        mask = mask[..., : key.shape[-2]]
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias + mask
    options: dict[str, Any] = {"scale": given.get("scaling"), "softcap": given.get("softcap") or None}
    _compare(call.result, query, key, mask, **options)
    return head_stats(
        as_attention_sees(query),
        as_attention_sees(key),
        attn_mask=None if mask is None else mask.detach(),
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )


def _compare(
    result: Any, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
) -> None:
    """Refuse a function whose weights are not those of softmax(cap(scale q k^T) + mask): models may have their own."""
    weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
    if not isinstance(weights, Tensor) or weights.ndim != 4:
        return
    weights = weights[0, :, :_QUERIES_CHECKED]
    query, key = query[0, :, :_QUERIES_CHECKED], key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if mask is not None:
        logits = logits + mask[0, :, :_QUERIES_CHECKED]
    ours = logits.softmax(-1, dtype=torch.float32)
    kept = weights != 0  # dropout has taken some away and enlarged the others
    if weights.shape != ours.shape:
        raise NotMeasuredError(f"it returned weights {tuple(weights.shape)} where {tuple(ours.shape)} were expected")
    ours, theirs = ours[kept], weights[kept].float()
    enlarged = theirs.sum() / ours.sum() if len(ours) else torch.ones(())
    distance = (theirs / enlarged - ours).abs().sum() / (2 * weights.shape[0] * weights.shape[1])
    if not distance <= _FURTHEST and not bool(theirs.isnan().any()):
        raise NotMeasuredError("the weights it returned are not softmax(scale * query key^T + mask)")


def _owner(call: Call) -> nn.Module | None:
    module = call.arguments().get("module")
    return module if isinstance(module, nn.Module) else None


BACK_END = BackEnd("Hugging Face eager attention", _measure, _owner)
