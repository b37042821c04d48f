"""What frozen features are worth: a linear probe, and the vote of nearest neighbours.

Shape letters: N images whose labels are known, B images asked about, D features, K classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Probe(NamedTuple):
    """A linear classifier of features.

    Attributes:
        weight: (K, D).
        bias: (K,).
        mean: of the features it was fitted to, (D,).
        std: of the same, (D,).
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Classify features (B, D): logits, (B, K)."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, decay: float = 1e-3, steps: int = 200) -> Probe:
    """Multinomial logistic regression on standardised features, by L-BFGS.

    Minimises the mean cross-entropy plus decay / 2 · (||weight||² + ||bias||²), which has one minimum: undecayed, the
    bias of a class without images would fall for ever.

    Args:
        features: (N, D).
        labels: (N,), int64.
        num_classes: K.
        decay: of weight and bias.
        steps: of L-BFGS at most.

    Returns:
        The probe, in the features' dtype; NaN if a feature is not finite.
    """
    mean = features.mean(dim=0)
    # A feature that is constant up to rounding must not be blown up.
    smallest = (1e-6 * features.abs().amax()).clamp(min=torch.finfo(features.dtype).tiny)
    std = torch.maximum(features.std(dim=0, correction=0), smallest)
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_zeros(num_classes)
    probe = Probe(weight, bias, mean, std)
    if not bool(features.isfinite().all()):
        return Probe(weight + torch.nan, bias + torch.nan, mean, std)
    inputs = (features - mean) / std
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        weight.requires_grad_()
        bias.requires_grad_()
        search = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            search.zero_grad()
            size = weight.square().sum() + bias.square().sum()
            loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + decay / 2 * size
            loss.backward()
            return loss

        search.step(closure)
    return probe._replace(weight=weight.detach(), bias=bias.detach())


def neighbour_votes(
    features: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int = 200, temperature: float = 0.07
) -> Tensor:
    """How the k nearest neighbours vote (Wu et al., CVPR 2018, arXiv 1805.01978, section 3.4).

    Near is a large cosine s; its vote counts exp(s / temperature), here over exp(1 / temperature), so that it is at
    most 1.

    Args:
        features: of the images asked about, (B, D).
        bank: of the images whose labels are known, (N, D).
        labels: (N,), int64.
        num_classes: K.
        k: neighbours that vote; all, where there are fewer.
        temperature: the lower, the more the nearest alone decide.

    Returns:
        The votes for each class, (B, K); NaN for features that are not finite.
    """
    cosines = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T  # (B, N)
    nearest, which = cosines.topk(min(k, len(bank)), dim=1)  # (B, k)
    votes = ((nearest - 1) / temperature).exp()
    return votes.new_zeros(len(features), num_classes).scatter_add(1, labels[which], votes)
