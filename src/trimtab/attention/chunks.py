"""The logits of one attention call, computed a chunk at a time: no L x S matrix of a long head is ever stored.

Shape letters: B batch, H query heads, L queries, S keys, D features; G query heads share one key head.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.attention.logits import Logits, finish_, take
from trimtab.attention.stats import AttentionStats, RowSums, row_sums_, stats_of
from trimtab.spectral import exact_products

# Logits held at once, beside scratch of the same size: 2 MB a thread, 4 to 16 MB in all. Less would stay in the
# cache nearest to a core, but threads then wait for each other more often than that is worth. 16 MB on other devices,
# where few large steps are faster than many small ones.
LOGITS_PER_THREAD = 2**19
LOGITS_ELSEWHERE = 2**22
_CAUSAL_ROWS = 128


class Chunk(NamedTuple):
    """Some queries of some heads, heads being counted over all leading dimensions.

    Attributes:
        heads: query heads, whose keys are those of `key_heads`.
        query: (key heads, G * queries, D), of the logits' dtype, as is `key`: (key heads, keys, D).
        logits: (heads, queries, keys), to be overwritten. -inf where a boolean mask or the window hides a key.
        hidden: True where a query may not see a key; broadcastable to the columns from `start` on.
        slope: derivative of the soft cap, where it was asked for.
    """

    heads: slice
    key_heads: slice
    rows: slice
    columns: slice
    query: Tensor
    key: Tensor
    logits: Tensor
    hidden: Tensor | None
    start: int
    slope: Tensor | None


@torch.no_grad()
def streamed_stats(of: Logits) -> tuple[AttentionStats, Tensor]:
    """`AttentionStats` of shape (B..., H, L), and how many keys each query may see, of the same shape."""
    numbers = of.query.new_empty((len(RowSums._fields), math.prod(of.lead), of.shape[-1]), dtype=of.dtype)
    memory = memory_for(of)
    scratch = torch.empty_like(memory)
    with exact_products(of.query.device.type):
        for chunk in chunks(of, memory):
            into = RowSums(*numbers[:, chunk.heads, chunk.rows].unbind())
            part = scratch[: chunk.logits.numel()].view(chunk.logits.shape)
            row_sums_(chunk.logits, chunk.hidden, chunk.start, part, into)
    sums = RowSums(*numbers.view(len(numbers), *of.shape).unbind())
    return stats_of(sums), sums.keys


def chunks(of: Logits, memory: Tensor, slope: bool = False) -> Iterator[Chunk]:
    """Compute the logits, chunk after chunk, in `memory`."""
    (L, D), group = of.query.shape[-2:], of.group
    key_lead = (*of.lead[:-1], of.lead[-1] // group)
    N = math.prod(key_lead)
    heads, rows, _ = _chunk_size(of)
    for n in range(0, N if L else 0, heads):
        key_heads = slice(n, min(n + heads, N))
        query_heads = slice(n * group, key_heads.stop * group)
        all_queries = take(of.query, of.lead, query_heads).expand(query_heads.stop - query_heads.start, -1, -1)
        all_keys = take(of.key, key_lead, key_heads).expand(key_heads.stop - n, -1, -1).to(of.dtype)
        for i in range(0, L, rows):
            some = slice(i, min(i + rows, L))
            columns = _columns(of, some)
            # Query heads that share keys become rows of one product: no key is copied per query head.
            query = all_queries[:, some].to(of.dtype)
            query = query.reshape(len(all_keys), -1, D) if group > 1 else query
            key = all_keys[:, columns]
            shape = (query_heads.stop - query_heads.start, some.stop - i, columns.stop - columns.start)
            logits = memory[: math.prod(shape)].view(len(key), -1, shape[-1])
            logits = torch.baddbmm(logits, query, key.mT, beta=0, alpha=of.scale, out=logits).view(shape)
            hidden, start, capped_slope = finish_(logits, of, query_heads, some, columns, slope)
            yield Chunk(query_heads, key_heads, some, columns, query, key, logits, hidden, start, capped_slope)


def _chunk_size(of: Logits) -> tuple[int, int, int]:
    """How many key heads and how many queries of each are taken at once, and how many keys these see at most."""
    (L, D), S, group = of.query.shape[-2:], of.key.shape[-2], of.group
    at_once = LOGITS_ELSEWHERE
    if of.query.device.type == "cpu":
        at_once = LOGITS_PER_THREAD * min(max(2, torch.get_num_threads()), 8)
    before, after = of.window
    # Half of a causal chunk's last square is hidden: few rows of several heads waste less than many rows of one.
    least = min(L, _CAUSAL_ROWS) if after is not None else L
    heads = min(max(1, at_once // max(1, group * least * S, S * D)), max(1, math.prod(of.lead) // group))
    rows, columns = max(1, at_once // (heads * group * S)), S
    if isinstance(of.positions, range) and before is not None and after is not None:
        # r queries see before + after + r keys: as many queries as the window is wide waste half of the work.
        span = before + after + 1
        rows = max(rows, min(span, at_once // (2 * span * heads * group)))
        columns = min(S, span + rows)
    return heads, max(1, min(rows, L)), columns


def memory_for(of: Logits) -> Tensor:
    """Enough for the logits of one chunk, as one row."""
    heads, rows, columns = _chunk_size(of)
    return of.query.new_empty(heads * of.group * rows * columns, dtype=of.dtype)


def _columns(of: Logits, rows: slice) -> slice:
    """The keys that some of the queries see, in one piece and never none."""
    S, (before, after) = of.key.shape[-2], of.window
    first, last = of.positions[rows.start], of.positions[rows.stop - 1]
    stop = S if after is None else min(max(last + after + 1, 1), S)
    return slice(0 if before is None else min(max(first - before, 0), stop - 1), stop)
