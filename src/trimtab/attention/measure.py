"""Where attention statistics are computed: by the Triton kernel where it can, else in chunks by torch alone."""

from torch import Tensor

from trimtab.attention import chunks, triton_kernel
from trimtab.attention.logits import Logits
from trimtab.attention.stats import AttentionStats


def measured(of: Logits) -> tuple[AttentionStats, Tensor]:
    """`AttentionStats` of shape (B..., H, L), and how many keys each query may see, of the same shape."""
    return triton_kernel.row_stats(of) if triton_kernel.supports(of) else chunks.streamed_stats(of)
