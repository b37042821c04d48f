"""The tap on `nn.MultiheadAttention` and on the evaluation fast path of `nn.TransformerEncoderLayer`.

With `need_weights=False` a module calls `scaled_dot_product_attention` and the tap there sees it. With
`need_weights=True`, or on the fast path, which is one fused call for a whole encoder layer, no query or key ever shows:
then they are projected once more from the module's inputs.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.attention.varlen import varlen_stats_and_keys
from trimtab.reparam.multihead import MultiheadAttention as Converted
from trimtab.watch.signals import HeadStats, head_stats
from trimtab.watch.signals.heads import per_head_stats
from trimtab.watch.taps.backend import BackEnd, Call


def methods() -> list[tuple[type, BackEnd]]:
    """The classes whose `forward` is tapped."""
    return [(nn.MultiheadAttention, BACK_END), (Converted, BACK_END), (nn.TransformerEncoderLayer, FAST_PATH)]


def _measure(call: Call) -> HeadStats:
    return _stats(*call.args, **call.kwargs)


def _measure_layer(call: Call) -> HeadStats:
    return _layer_stats(*call.args, **call.kwargs)


def _layer_stats(
    layer: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> HeadStats:
    """Of the self-attention in an encoder layer that was one fused call."""
    x = layer.norm1(src) if layer.norm_first else src
    if x.is_nested:  # nn.TransformerEncoder packs padded sequences so; a mask beside it is refused there
        return _nested_stats(layer.self_attn, x)
    return _stats(layer.self_attn, x, x, x, key_padding_mask=src_key_padding_mask, attn_mask=src_mask)


def _stats(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> HeadStats:
    """Arguments of `nn.MultiheadAttention.forward`; `is_causal` is only a hint about `attn_mask`."""
    if query.is_nested:
        return _nested_stats(module, query)
    q, k = _project(module, query, key, value)
    if query.ndim == 2:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not module.batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)  # (B, L, E)
    # The converted class merges masks and appends keys just as torch's own does, and asks no more of `module`.
    mask = Converted._additive_mask(
        module, attn_mask, key_padding_mask, q.shape[0], q.shape[1], k.shape[1], torch.float32
    )
    k, _, mask = Converted._with_extra_keys(module, k, k, mask)
    return head_stats(_heads(module, q), _heads(module, k), attn_mask=mask)


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., E) as the module itself makes them."""
    if isinstance(module, Converted):
        q, k, _ = module._project(query, key, value)
        return q.detach(), k.detach()
    if module.in_proj_weight is None:
        w_q, w_k = module.q_proj_weight, module.k_proj_weight
    else:
        w_q, w_k, _ = module.in_proj_weight.chunk(3)
    b_q, b_k, _ = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return F.linear(query, w_q, b_q).detach(), F.linear(key, w_k, b_k).detach()


def _heads(module: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (module.num_heads, -1)).transpose(-3, -2)  # (..., L, E) -> (..., H, L, D)


def _nested_stats(module: Any, x: Tensor) -> HeadStats:
    """Self-attention over sequences of several lengths: no padding takes part, neither as key nor as query."""
    sequences = x.unbind()
    packed = torch.cat(sequences)  # (all tokens, E)
    q, k = _project(module, packed, packed, packed)
    q, k = (part.unflatten(-1, (module.num_heads, -1)) for part in (q, k))  # (T, H, D)
    ends = list(accumulate(map(len, sequences), initial=0))
    return per_head_stats(*varlen_stats_and_keys(q, k, ends, ends))


def _inner(call: Call) -> nn.Module | None:
    return call.args[0] if isinstance(call.args[0], nn.MultiheadAttention) else call.args[0].self_attn


BACK_END = BackEnd("nn.MultiheadAttention", _measure, _inner)
FAST_PATH = BackEnd("nn.TransformerEncoderLayer, fast path", _measure_layer, _inner)
