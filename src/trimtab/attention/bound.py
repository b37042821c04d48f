"""How low attention entropy can fall, given only the size of the logits."""

import torch
from torch import Tensor


def entropy_lower_bound(logit_norm: float | Tensor, num_keys: int | Tensor) -> Tensor:
    """Smallest entropy of a softmax over `num_keys` logits whose centred row has norm `logit_norm`, in nats.

    Theorem 3.1 of sigma-Reparam (Zhai et al., ICML 2023, arXiv 2303.06296), with S the norm, T the number of
    keys and `beta = exp(-S sqrt(T / (T - 1)))`:

        Ent >= log(1 + (T - 1) beta) + S sqrt(T (T - 1)) beta / (1 + (T - 1) beta)

    It is reached when one logit stands above T - 1 equal ones. The paper, whose attention has no factor
    1 / sqrt(d), takes `S = ||W_K W_Q^T||_2 ||X X^T||_2`; with scaled attention divide that product by
    sqrt(d_head). Any bound on the norm of the row of logits may stand for S, and the tightest is the measured
    norm, `(logits - logits.mean(-1, keepdim=True)).norm(dim=-1)` over the keys that the query sees.

    Args:
        logit_norm: S >= 0, a number or a tensor of any shape; inf is allowed and gives 0.
        num_keys: T >= 1, an integer or an integer tensor that broadcasts with `logit_norm`.

    Returns:
        Tensor of the broadcast shape, in nats: float64 for a number or a float64 tensor, else float32. It is
        0 for one key.

    Raises:
        TypeError: an argument that is not a number or a tensor of numbers.
        ValueError: a negative norm, or fewer than one key.
    """
    norm = _numbers("logit_norm", logit_norm)
    keys = _numbers("num_keys", num_keys)
    if not isinstance(logit_norm, Tensor):
        norm = norm.to(keys.device)
    dtype = torch.float32 if norm.dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float64
    # The formula itself is computed in float64: T - 1 small terms times a difference of large ones.
    S, T = norm.detach().double(), keys.detach().to(norm.device).double()
    if bool((S < 0).any()):
        raise ValueError(f"expected logit_norm >= 0 (the norm of a row of logits), got {S.min().item()}")
    if not bool((T >= 1).all()):
        raise ValueError(f"expected num_keys >= 1, got {T.min().item():g}")
    return unchecked_lower_bound(S, T).to(dtype)


def unchecked_lower_bound(S: Tensor, T: Tensor) -> Tensor:
    """The formula alone, in the tensors' own precision and without a look at them; 0 where T is below 1."""
    others = (T - 1).clamp(min=0)
    gap = S * (T / others.clamp(min=1)).sqrt()  # of the highest logit above the others
    beta = (-gap).exp()
    # S sqrt(T (T - 1)) beta = (T - 1) gap beta; e^-1000 is 0 already, and inf * 0 would be NaN.
    return (others * beta).log1p() + others * gap.clamp(max=1000.0) * beta / (1 + others * beta)


def _numbers(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor) and not value.is_complex() and value.dtype != torch.bool:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    raise TypeError(f"expected {name} to be a number or a tensor of numbers, got {value!r:.80}")
