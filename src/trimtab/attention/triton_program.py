"""The program of `trimtab.attention.triton_kernel`; importing it needs triton, and settles if it is interpreted."""
# mypy: ignore-errors
# Triton compiles these functions itself: their arguments have types of its own.

import triton
import triton.language as tl

from trimtab.attention.stats import HIDDEN

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-200.0)  # 2 to this is 0 in float32, and yet it is finite: no 0 * -inf
MASKED = tl.constexpr(HIDDEN)
WITH_NAN = tl.constexpr(tl.PropagateNan.ALL)
NONE, BOOLEAN, ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def nothing():
    """Does nothing, if all is well."""


@triton.jit
def tanh(x):
    """Hyperbolic tangent to float32's precision, also near 0, where the formula with exponentials cancels."""
    power = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - power) / (1 + power)
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


INTERPRETED = tl.constexpr(not isinstance(tanh, triton.JITFunction))


@triton.jit
def load(
    start, row, row_stride, column, column_stride, rows, columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr
):
    """Load a tile of a matrix, with 0 beyond the edges that it may reach over."""
    at = start + row * row_stride + column * column_stride
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(at)
    if EVEN_ROWS:
        return tl.load(at, mask=column < columns, other=0.0)
    if EVEN_COLUMNS:
        return tl.load(at, mask=row < rows, other=0.0)
    return tl.load(at, mask=(row < rows) & (column < columns), other=0.0)


@triton.jit
def add_product(s, q, k):
    """Return s + q @ k in float32, float32's products included."""
    if INTERPRETED:  # which would multiply the bits of bfloat16 as if they were integers
        q, k = q.to(tl.float32), k.to(tl.float32)
    return tl.dot(q, k, s, input_precision="ieee")


# Lengths and the like differ from call to call; only strides are worth a program of their own (aligned, or 1).
@triton.jit(do_not_specialize=["heads", "group", "L", "S", "offset", "left", "right"])
def row_stats(
    query,
    key,
    mask,
    slopes,
    stats,
    query_b,
    query_h,
    query_m,
    query_d,
    key_b,
    key_h,
    key_n,
    key_d,
    mask_b,
    mask_h,
    mask_m,
    mask_n,
    slopes_b,
    slopes_h,
    heads,
    group,
    L,
    S,
    scale,
    softcap,
    offset,
    left,
    right,
    D: tl.constexpr,
    RAW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    MASK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """Statistics of BLOCK_M queries of one head, in one pass over their keys, BLOCK_N at a time.

    With s a logit, u the unit that makes it one of base 2 and r = u max s so far, kept are e = u s - r, l = sum 2^e
    and t = sum 2^e e. Whenever the maximum moves by d = r_old - r_new <= 0, l becomes 2^d l and t 2^d (t + d l). No
    term of either sum is of the other sign, so nothing cancels, and how r is rounded does not matter: the entropy
    log l - t / l does not depend on it. The row norm merges each block's mean and sum of squares about it (Chan,
    Golub & LeVeque, 1983).

    `query`, `key`, `mask` (float or uint8) are of shapes (B, heads, ...) with strides in elements, `stats` is
    (5, B, heads, L): entropy, largest logit, log-sum-exp, row norm, number of visible keys. RAW: the logits are the
    dot products times a positive scale, and nothing else, so the scale goes into u.
    """
    blocks = tl.cdiv(L, BLOCK_M)
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)  # counted over the whole batch
    b, h = head // heads, head % heads
    first = (blocks - 1 - program % blocks) * BLOCK_M  # the longest rows of a causal head come first
    query += b * query_b + h * query_h
    key += b * key_b + h // group * key_h

    m = first + tl.arange(0, BLOCK_M)
    row = tl.minimum(m, L - 1).to(tl.int64)[:, None]  # beyond the last query the last once more, never stored
    d = tl.arange(0, STEP_D).to(tl.int64)
    if STEP_D == BLOCK_D:
        q = load(query, row, query_m, d[None, :], query_d, L, D, True, BLOCK_D == D)
    if MASK != NONE:
        mask += b * mask_b + h * mask_h
    if SLOPES:
        slope = tl.load(slopes + b * slopes_b + h * slopes_h).to(tl.float32)
    # To base 2 in one step with the difference to the maximum, or after it: a mask may add the lowest of numbers.
    inner, outer = 1.0, LOG2E
    if RAW:
        inner, outer = scale * LOG2E, 1.0

    # Query m sees the keys low[m] ... high[m] - 1. Those of all queries of this program: whole blocks from
    # `whole` on, and blocks that only some see, or that reach over the end, before and after them.
    low, high = tl.full([BLOCK_M], 0, tl.int32), tl.full([BLOCK_M], S, tl.int32)
    start, whole, stop, end = 0, 0, S // BLOCK_N * BLOCK_N, S
    if RIGHT:
        high = tl.maximum(tl.minimum(m + offset + right + 1, S), 0)
        stop = tl.maximum(tl.minimum(first + offset + right + 1, S), 0) // BLOCK_N * BLOCK_N
        end = tl.maximum(tl.minimum(first + BLOCK_M + offset + right, S), 0)
    if LEFT:
        low = tl.maximum(m + offset - left, 0)
        start = tl.minimum(tl.maximum(first + offset - left, 0) // BLOCK_N * BLOCK_N, end)
        whole = tl.cdiv(tl.maximum(first + BLOCK_M - 1 + offset - left, 0), BLOCK_N) * BLOCK_N
        whole = tl.maximum(start, tl.minimum(whole, tl.cdiv(end, BLOCK_N) * BLOCK_N))
        stop = tl.maximum(stop, whole)
    skipped = stop - whole

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    pivot = tl.full([BLOCK_M], 0.0, tl.float32)
    l = tl.full([BLOCK_M], 0.0, tl.float32)  # noqa: E741 - the letter of the formula
    t = tl.full([BLOCK_M], 0.0, tl.float32)
    count = tl.full([BLOCK_M], 0.0, tl.float32)
    mean = tl.full([BLOCK_M], 0.0, tl.float32)
    squares = tl.full([BLOCK_M], 0.0, tl.float32)
    for EDGE in tl.static_range(2):
        from_, to = whole, stop
        if EDGE:
            from_, to = start, end - skipped
        for n_first in range(from_, to, BLOCK_N):
            n = n_first + tl.arange(0, BLOCK_N)
            if EDGE:
                n += tl.where(n_first >= whole, skipped, 0)
            column = n.to(tl.int64)[None, :]
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if STEP_D == BLOCK_D:
                k = load(key, d[:, None], key_d, column, key_n, D, S, BLOCK_D == D, EDGE == 0)
                s = add_product(s, q, k)
            else:
                for d_first in range(0, BLOCK_D, STEP_D):
                    d_part = d_first + d
                    q = load(query, row, query_m, d_part[None, :], query_d, L, D, True, BLOCK_D == D)
                    k = load(key, d_part[:, None], key_d, column, key_n, D, S, BLOCK_D == D, EDGE == 0)
                    s = add_product(s, q, k)
            if not RAW:
                s *= scale
            if SOFTCAP:
                s = softcap * tanh(s / softcap)
            if SLOPES:
                s -= slope * tl.abs(m[:, None] + offset - n[None, :]).to(tl.float32)
            if MASK != NONE:
                bias = load(mask, row, mask_m, column, mask_n, L, S, True, EDGE == 0)
            if MASK == ADDITIVE:
                bias = bias.to(tl.float32)
                s += bias
            if MASK == BOOLEAN:
                s = tl.where(bias != 0, s, -float("inf"))
            if EDGE:
                s = tl.where((n[None, :] >= low[:, None]) & (n[None, :] < high[:, None]), s, -float("inf"))

            top_new = tl.maximum(top, tl.max(s, 1))
            pivot_new = tl.where(top_new == -float("inf"), 0.0, top_new * inner)
            e = tl.fma(s, inner, -pivot_new[:, None]) * outer
            if EDGE or MASK != NONE:
                visible = s != -float("inf")
                if MASK == ADDITIVE:
                    visible &= (bias > MASKED) | (bias != bias)
                block = tl.sum(visible.to(tl.float32), 1)
                centred = tl.where(visible, e, 0.0)
                total, squares_b = tl.sum(centred, 1), tl.sum(centred * centred, 1)
                e = tl.maximum(e, NOTHING, propagate_nan=WITH_NAN)
            else:
                block = tl.full([BLOCK_M], BLOCK_N, tl.float32)
                total, squares_b = tl.sum(e, 1), tl.sum(e * e, 1)
            p = tl.exp2(e)

            shift = tl.where(top == -float("inf"), NOTHING, tl.maximum((pivot - pivot_new) * outer, NOTHING))
            shrink = tl.exp2(shift)
            t = shrink * (t + shift * l) + tl.sum(p * e, 1)
            l = shrink * l + tl.sum(p, 1)  # noqa: E741
            top, pivot = top_new, pivot_new

            mean_b = total / tl.maximum(block, 1.0)
            part = block / tl.maximum(count + block, 1.0)
            delta = tl.where(block > 0, mean_b + pivot * outer - mean, 0.0)
            mean += delta * part
            squares += squares_b - mean_b * total + delta * delta * count * part
            count += block

    if RAW:
        top *= scale
    top = tl.where((l == l) | (top == float("inf")), top, float("nan"))  # the maximum itself passes over NaN
    entropy = tl.where(l == 0, 0.0, (tl.log2(l) - t / l) * LN2)
    field = (tl.num_programs(0) // blocks).to(tl.int64) * L
    at = stats + head * L + m
    tl.store(at, tl.where(entropy < 0, 0.0, entropy), mask=m < L)
    tl.store(at + field, top, mask=m < L)
    tl.store(at + 2 * field, top + tl.log2(l) * LN2, mask=m < L)
    tl.store(at + 3 * field, tl.sqrt(tl.where(squares < 0, 0.0, squares)) * LN2, mask=m < L)
    tl.store(at + 4 * field, count, mask=m < L)
