"""What the logits of one attention call are made of, and all that happens to them between product and softmax.

Shape letters: B batch, H query heads, L queries, S keys, D features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.attention.stats import HIDDEN

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`score_mod(score, b, h, q_idx, kv_idx)` of `torch.nn.attention.flex_attention`."""


@dataclass(frozen=True)
class Logits:
    """The logits of one attention call, described but not computed. What it is given is not checked.

    The order is: scale, soft cap, ALiBi, additive mask, `score_mod`; then the boolean mask and the window hide keys.

    Attributes:
        query: (B..., H, L, D), some leading dimensions perhaps of size 1 or left out.
        key: (B..., H / group, S, D), likewise.
        shape: of the result, (B..., H, L); (L,) alone is one head.
        scale: factor on the products of query and key.
        positions: the key index that each query stands at, ascending.
        group: query heads per key head.
        mask: broadcastable to (B..., H, L, S); boolean (True takes part) or floating (added).
        window: how many keys before and after its own position a query sees; None is all of them.
        softcap: c, when logits s become c tanh(s / c).
        score_mod: as in flex_attention; the shape is then (B, H, L).
        slopes: m, broadcastable to (B..., H), when ALiBi adds -m |position - key index|.
    """

    query: Tensor
    key: Tensor
    shape: tuple[int, ...]
    scale: float
    positions: Sequence[int]
    group: int = 1
    mask: Tensor | None = None
    window: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    score_mod: ScoreMod | None = None
    slopes: Tensor | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """B..., H."""
        return self.shape[:-1] or (1,)

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits: float32, or float64 when query or key is float64."""
        return torch.float64 if torch.float64 in (self.query.dtype, self.key.dtype) else torch.float32


def finish_(
    logits: Tensor, of: Logits, heads: slice, rows: slice, columns: slice, slope: bool = False
) -> tuple[Tensor | None, int, Tensor | None]:
    """Turn scaled products of query and key into logits, in place.

    Args:
        logits: (heads, rows, columns), a part of the whole; heads are counted over all leading dimensions.
        of: the whole.
        heads: which part it is, like `rows` and `columns`.
        rows: queries.
        columns: keys.
        slope: whether the derivative of the soft cap is wanted.

    Returns:
        hidden: True where a query may not see a key; broadcastable to the columns from `start` on. Where a boolean
            mask, the window or `score_mod` hides it, the logit is -inf.
        start: the columns before it are seen by all.
        slope: of the logits' shape; None without a soft cap, or not wanted.
    """
    capped_slope = None if of.softcap is None else _cap_(logits, of.softcap, slope)
    if of.slopes is not None:
        _add_alibi_(logits, of, heads, rows, columns)
    hidden, start = None, 0
    mask = None if of.mask is None else _mask_part(of.mask, of, heads, rows, columns)
    additive = mask is not None and mask.dtype != torch.bool
    if mask is not None and additive:
        logits.add_(mask)
        hidden = mask <= HIDDEN
    if of.score_mod is not None:
        logits.copy_(_modified(logits, of, heads, rows, columns))
        nothing = logits == -torch.inf
        hidden = nothing if hidden is None else nothing | hidden
    if mask is not None and not additive:
        logits.masked_fill_(~mask, -torch.inf)
        hidden = ~mask if hidden is None else hidden | ~mask
    if of.window != (None, None):
        outside, first = _outside(of, rows, columns)
        logits[..., first:].masked_fill_(outside, -torch.inf)
        if hidden is None:
            hidden, start = outside, first
        else:
            hidden = hidden | F.pad(outside, (first, 0))
    return hidden, start, capped_slope


def take(tensor: Tensor, lead: tuple[int, ...], heads: slice, rows: slice = slice(None)) -> Tensor:
    """Some heads, counted over `lead`, to which the tensor's own leading dimensions broadcast, and some of its rows.

    Returns:
        (heads, rows, ...); a dimension of size 1 stays so where it stands for all heads or all rows.
    """
    own, last = tensor.shape[:-2], tensor.shape[-2:]
    rows = rows if last[0] > 1 else slice(None)
    if math.prod(own) == 1:
        return tensor.reshape(1, *last)[:, rows]
    if own == lead and (len(own) == 1 or tensor.is_contiguous()):
        return tensor.view(-1, *last)[heads, rows]
    if heads == slice(0, math.prod(lead)):
        return tensor[..., rows, :].expand(*lead, -1, -1).flatten(0, -3)
    numbers = torch.unravel_index(torch.arange(heads.start, heads.stop, device=tensor.device), lead)
    # A dimension that broadcasts has index 0 alone.
    own_numbers = zip(numbers[len(lead) - len(own) :], own, strict=True)
    index: tuple[Tensor | slice, ...] = (*(i if size > 1 else i * 0 for i, size in own_numbers), rows)
    return tensor[index]


def _mask_part(mask: Tensor, of: Logits, heads: slice, rows: slice, columns: slice) -> Tensor:
    for dim, stride in enumerate(mask.stride()):
        if stride == 0:  # it only repeats itself: no chunk need copy more than one
            mask = mask.narrow(dim, 0, 1)
    part = take(mask, of.lead, heads, rows)
    return part if part.shape[-1] == 1 else part[..., columns]


def _cap_(logits: Tensor, softcap: float, slope: bool) -> Tensor | None:
    """Turn s into c tanh(s / c); return its derivative, 1 - tanh^2, where it is asked for."""
    logits.div_(softcap).tanh_()
    derivative = 1 - logits.square() if slope else None
    logits.mul_(softcap)
    return derivative


def _add_alibi_(logits: Tensor, of: Logits, heads: slice, rows: slice, columns: slice) -> None:
    assert of.slopes is not None
    slopes = of.slopes.expand(of.lead).reshape(-1)[heads].to(of.dtype)
    j = torch.arange(columns.start, columns.stop, device=logits.device)
    distance = (_positions(of, rows)[:, None] - j).abs().to(of.dtype)
    logits.addcmul_(slopes[:, None, None], distance, value=-1)


def _modified(logits: Tensor, of: Logits, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The logits through `score_mod`, called on one number at a time as far as it can see."""
    # Lets `score_mod` index captured tensors with its arguments (torch 2.5 and later; flex_attention does so too).
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    assert of.score_mod is not None
    device = logits.device
    b, h = torch.unravel_index(torch.arange(heads.start, heads.stop, device=device), of.lead)
    j = torch.arange(columns.start, columns.stop, device=device)
    over_keys = torch.vmap(of.score_mod, (0, None, None, None, 0))
    over_queries = torch.vmap(over_keys, (0, None, None, 0, None))
    over_heads = torch.vmap(over_queries, (0, 0, 0, None, None))
    with TransformGetItemToIndex():
        modified: Tensor = over_heads(logits, b, h, _positions(of, rows), j)
    return modified


def _outside(of: Logits, rows: slice, columns: slice) -> tuple[Tensor, int]:
    """Where a key lies outside the query's window, in the columns from the returned one on; those before lie inside."""
    before, after = of.window
    first = of.positions[rows.start]
    start = 0
    if before is None and after is not None:
        start = min(max(first + after + 1 - columns.start, 0), columns.stop - columns.start)
    if before is None and after is not None and isinstance(of.positions, range):  # causal: a triangle
        shape = (rows.stop - rows.start, columns.stop - columns.start - start)
        everything = torch.ones(shape, dtype=torch.bool, device=of.query.device)
        return everything.triu_(first + after + 1 - columns.start - start), start
    at, j = _positions(of, rows)[:, None], torch.arange(columns.start + start, columns.stop, device=of.query.device)
    hidden = torch.zeros(len(at), len(j), dtype=torch.bool, device=j.device)
    if after is not None:
        hidden |= j > at + after
    if before is not None:
        hidden |= j < at - before
    return hidden, start


def _positions(of: Logits, rows: slice) -> Tensor:
    device = of.query.device
    at = of.positions[rows]
    return torch.arange(at.start, at.stop, device=device) if isinstance(at, range) else torch.tensor(at, device=device)
