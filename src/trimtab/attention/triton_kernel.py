"""Attention statistics on a GPU: one Triton program, one pass over the keys. triton itself is loaded on first use."""

import logging
import math
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trimtab.attention.logits import Logits
from trimtab.attention.stats import AttentionStats

logger = logging.getLogger("trimtab")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MASKS = (*_DTYPES, torch.float64, torch.bool)


class Tiles(NamedTuple):
    """How the work is cut: queries, keys and features taken at once, and how Triton is to lay that out."""

    queries: int
    keys: int
    features: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def supports(of: Logits) -> bool:
    """Whether `row_stats` can take this call: plain tensors on an NVIDIA GPU of compute capability 8.0 or more.

    Left to others are also float64, query and key of two dtypes, heads of more than 256 features, `score_mod`,
    positions that are not consecutive, and a mask or slopes with several batch dimensions. triton is loaded only
    once all else is well; where it does not work, a warning says so once.
    """
    query, key, mask = of.query, of.key, of.mask
    tensors = [tensor for tensor in (query, key, mask, of.slopes) if tensor is not None]
    return (
        _capability(query.device) >= (8, 0)
        and query.dtype == key.dtype
        and query.dtype in _DTYPES
        and query.shape[-1] <= 256
        and query.numel() > 0
        and key.numel() > 0
        and (mask is None or mask.dtype in _MASKS)
        and (len(of.lead) <= 2 or (mask is None and of.slopes is None))
        and of.score_mod is None
        and isinstance(of.positions, range)
        and of.positions.step == 1
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and _triton_works(query.device)
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    nvidia = device.type == "cuda" and torch.version.cuda is not None  # AMD's GPUs call themselves cuda too
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether a program that does nothing compiles and starts; asked once in a process."""
    if find_spec("triton") is None:
        return False
    try:
        from trimtab.attention.triton_program import nothing

        with torch.cuda.device(device):
            nothing[(1,)](enable_fp_fusion=True)
    except Exception as error:  # no C compiler, no driver, an old triton: all kinds
        logger.warning("attention statistics go without Triton, which does not work on %s: %s", device, error)
        return False
    return True


@torch.no_grad()
def row_stats(of: Logits) -> tuple[AttentionStats, Tensor]:
    """What `trimtab.attention.chunks.streamed_stats` returns, from one launch of one program.

    Each of its instances holds some queries of one head and goes once over their keys, as flash attention does
    (Dao et al., NeurIPS 2022, arXiv 2205.14135), with sums relative to the largest logit so far. Products of
    float32 are float32's own (no TF32), those of half precision are summed in float32, and so are all statistics.
    No L x S matrix is stored, nothing is copied but tensors of three or more leading dimensions that are no view
    of two, and nothing waits for the device. The first call of a kind compiles for a second or so; Triton keeps
    the result on disk.

    A block's squares are summed about the largest logit and then moved to their mean. So where one logit towers
    over S keys that are nearly alike, the row norm's relative error can grow to about S / 2**25.

    Args:
        of: a call that `supports` says yes to.

    Returns:
        `AttentionStats` and the number of keys each query may see: float32 tensors of shape (B..., H, L).
    """
    from trimtab.attention import triton_program as program

    (L, D), S = of.query.shape[-2:], of.key.shape[-2]
    query, key = _four(of.query, of.lead), _four(of.key, (*of.lead[:-1], of.lead[-1] // of.group))
    kind, mask = program.NONE, of.mask
    if mask is not None:
        kind = program.BOOLEAN if mask.dtype == torch.bool else program.ADDITIVE
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask = _four(mask.expand(*mask.shape[:-2], L, S), of.lead)
    slopes = None if of.slopes is None else _four(of.slopes[..., None, None], of.lead)

    before, after = of.window
    tiles = _tiles(of)
    features = max(16, 1 << (D - 1).bit_length())  # Triton's sizes are powers of two, a product's at least 16
    grid = (query.shape[0] * query.shape[1] * math.ceil(L / tiles.queries),)
    numbers = query.new_empty((len(AttentionStats._fields) + 1, *of.shape), dtype=torch.float32)
    with torch.cuda.device_of(query):  # triton launches on the current device
        program.row_stats[grid](
            *(query, key, mask, slopes, numbers),
            *(*query.stride(), *key.stride()),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *((0, 0) if slopes is None else slopes.stride()[:2]),
            *(of.lead[-1], of.group, L, S, float(of.scale), float(of.softcap or 1)),
            *(of.positions[0], min(before or 0, 2**30), min(after or 0, 2**30)),
            D=D,
            RAW=kind is not program.ADDITIVE and of.softcap is None and slopes is None and bool(of.scale > 0),
            SOFTCAP=of.softcap is not None,
            SLOPES=slopes is not None,
            MASK=kind.value,
            LEFT=before is not None,
            RIGHT=after is not None,
            BLOCK_M=tiles.queries,
            BLOCK_N=tiles.keys,
            BLOCK_D=features,
            STEP_D=min(features, tiles.features),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            maxnreg=tiles.maxnreg,
            enable_fp_fusion=True,
        )
    *stats, keys = numbers.unbind()
    return AttentionStats(*stats), keys


def _four(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Make it (B, H, rows, columns)."""
    tensor = tensor.expand(*lead, *tensor.shape[-2:])
    return tensor.reshape(math.prod(lead[:-1]), lead[-1], *tensor.shape[-2:])


def _tiles(of: Logits) -> Tiles:
    """Sizes that spill hardly a register, and fit into the 99 KB of shared memory that every supported GPU has."""
    D = of.query.shape[-1]
    if of.query.dtype == torch.float32:
        return Tiles(64, 64, 32, num_warps=8, num_stages=2)
    if of.mask is not None:
        return Tiles(64, 64, 64, num_warps=4, num_stages=2)
    if D > 128:
        return Tiles(64, 64, 256, num_warps=4, num_stages=2)
    # 128 registers, so that two of these run on a multiprocessor at a time, one's products beside the other's sums.
    keys = 128 if _capability(of.query.device)[0] in (9, 10) else 64
    return Tiles(128, keys, 128, num_warps=8, num_stages=3 if D <= 64 else 2, maxnreg=128)
