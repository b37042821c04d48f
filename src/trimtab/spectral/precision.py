"""In what precision matrix products are computed: contexts for training's own and for measurements."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves operations on this tensor's device alone; TF32 stays as it is."""
    return _without_autocast(tensor.device.type)


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Matrix products in true float32: no autocast, also where TF32 or bfloat16 are allowed for speed."""
    with _without_autocast(device_type), _ieee():
        yield


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


@contextmanager
def _ieee() -> Iterator[None]:
    """Forbid TF32 and bfloat16 in float32 products, and have torch's settings back as they were.

    There are two interfaces to them, and torch refuses to read the older one while the two disagree: both are set.
    """
    matmuls = [each for each in _matmuls() if hasattr(each, "fp32_precision")]
    before = [matmul.fp32_precision for matmul in matmuls]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface says otherwise, and alone counts
        legacy = ""
    if legacy == "highest" and set(before) <= {"ieee", "none"}:
        yield
        return
    try:
        if legacy:
            torch.set_float32_matmul_precision("highest")
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        if legacy:
            torch.set_float32_matmul_precision(legacy)
        for matmul, precision in zip(matmuls, before, strict=True):
            matmul.fp32_precision = "none"  # what torch.backends.fp32_precision says
            if matmul.fp32_precision != precision:
                matmul.fp32_precision = precision


def _matmuls() -> list[Any]:
    """The settings of matrix products on CUDA and on the CPU; they have `fp32_precision` from torch 2.9 on."""
    return [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
