"""SimCLR: a Vision Transformer and the projector that its contrastive loss is taken after.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, arXiv 2002.05709. The
features before the projector are what is of use afterwards.

Shape letters: B batch, C channels, D features of the encoder, E features of an embedding.
"""

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.models.vit import ViT, ViTConfig

ProjectorNorm = Literal["none", "batch"]


class SimCLR(nn.Module):
    """Images (B, C, side, side) in; features (B, D) and embeddings (B, E) out.

    The weights are drawn from the global random number generator: seed it for the same model again.

    Args:
        config: of the encoder, with `num_classes` 0.
        hidden: features between the two layers of the projector.
        out: features of an embedding, E.
        norm: what is between these two layers: nothing, or a BatchNorm over all processes, as in SimCLR. With several
            processes torch has that on GPUs alone.
        freeze_patches: whether the patch embedding stays as it was drawn, see `FixedPatches`.

    Raises:
        RecipeError: the encoder has a head, or an option is out of range.
    """

    def __init__(
        self, config: ViTConfig, hidden: int, out: int, norm: ProjectorNorm = "none", freeze_patches: bool = False
    ) -> None:
        super().__init__()
        if config.num_classes:
            raise RecipeError(f"the encoder of SimCLR has no classes: num_classes must be 0, got {config.num_classes}")
        if min(hidden, out) < 1:
            raise RecipeError(f"a projector needs at least one feature, got {hidden} hidden and {out} out")
        if norm not in get_args(ProjectorNorm):
            raise RecipeError(f"the projector's norm must be one of {', '.join(get_args(ProjectorNorm))}; got {norm!r}")
        self.encoder = ViT(config)
        if freeze_patches:
            self.encoder.patches = FixedPatches(self.encoder.patches)  # type: ignore[assignment]
        first, last = nn.Linear(config.dim, hidden), nn.Linear(hidden, out)
        for layer in (first, last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        between = nn.SyncBatchNorm(hidden) if norm == "batch" else nn.Identity()
        self.projector = nn.Sequential(first, between, nn.ReLU(), last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed.

        Args:
            images: (B, C, side, side), standardised, floating point.

        Returns:
            What is of use, features (B, D), and what the loss is taken of, embeddings (B, E), of any length.

        Raises:
            ValueError: `images` has another shape.
        """
        features = self.encoder(images)  # (B, D)
        return features, self.projector(features)


class FixedPatches(nn.Module):
    """A patch embedding that is a constant: a random projection, as in MoCo v3.

    Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021, arXiv 2104.02057,
    section 4.2: spikes begin in the first layer, and without its gradient there are fewer. Weight and bias are buffers
    under the same names: no optimiser holds them, so that they neither move nor decay, and no stabilizer of weights
    (sigma-Reparam, weight norm ...) takes the layer for one of its own.

    Args:
        patches: the embedding to freeze, a convolution without padding.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, patches: nn.Conv2d) -> None:
        super().__init__()
        self.stride = patches.stride
        self.register_buffer("weight", patches.weight.detach().clone())
        self.register_buffer("bias", None if patches.bias is None else patches.bias.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Project patches: (B, C, side, side) -> (B, D, rows, columns)."""
        return F.conv2d(images, self.weight, self.bias, self.stride)
