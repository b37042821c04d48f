"""A Vision Transformer in one file, made to be read in one sitting.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with the mean over patches in place of the
class token.
Query, key, value and output are four plain Linear layers, so that each has a spectral norm of its own.

Shape letters: B batch, C channels, P patches (the sequence; L and S of the attention are both P), H heads,
D features of the model, E = D / H features of a head.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError

Norm = Literal["pre", "post", "none"]
Init = Literal["torch", "normal", "trunc_normal", "xavier"]


@dataclass(frozen=True)
class ViTConfig:
    """What a `ViT` is made of.

    Attributes:
        image_size: side of the square images, in pixels.
        patch_size: side of the square patches, in pixels; divides `image_size`.
        in_channels: colour channels C.
        num_classes: number of logits.
        dim: features D of a token; a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads H in each block.
        mlp_ratio: hidden features of the MLP, in multiples of `dim`.
        norm: LayerNorm before each half of a block and before the head ("pre"), after each residual sum
            ("post", as in Vaswani et al., 2017), or nowhere ("none").
        init: where the weights of Linear and Conv2d layers start: PyTorch's own default ("torch"),
            N(0, init_std²) ("normal"), the same cut off at two standard deviations ("trunc_normal"), or
            Glorot's uniform ("xavier"). Biases start at zero, except with "torch".
        init_std: standard deviation for "normal" and "trunc_normal"; the other two do not use it.
        position_std: standard deviation of the learned position embedding at the start.

    Raises:
        RecipeError: a field is out of range, or two of them do not fit together.
    """

    image_size: int
    patch_size: int
    in_channels: int
    num_classes: int
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: int = 4
    norm: Norm = "pre"
    init: Init = "trunc_normal"
    init_std: float = 0.02
    position_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = (
            "image_size",
            "patch_size",
            "in_channels",
            "num_classes",
            "dim",
            "depth",
            "num_heads",
            "mlp_ratio",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, choices in (("norm", get_args(Norm)), ("init", get_args(Init))):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("init_std", "position_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise RecipeError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"choose a patch_size that divides {self.image_size}"
            )
        if self.dim % self.num_heads:
            raise RecipeError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; heads are all of one size"
            )

    @property
    def num_patches(self) -> int:
        """Length P of the token sequence."""
        return (self.image_size // self.patch_size) ** 2


class Attention(nn.Module):
    """Multi-head self-attention over P tokens, (B, P, D) -> (B, P, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token; x and the result are (B, P, D)."""
        heads = (self.num_heads, -1)
        # (B, P, D) -> (B, P, H, E) -> (B, H, P, E), three times
        query = self.query(x).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)
        value = self.value(x).unflatten(-1, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, H, P, E)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, P, E) -> (B, P, H, E) -> (B, P, D)


class MLP(nn.Module):
    """Two layers with a GELU between them, (B, P, D) -> (B, P, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = nn.Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself; x and the result are (B, P, D)."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention, then MLP, each with a residual connection and its norm where the config puts it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.post_norm = config.norm == "post"
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; x and the result are (B, P, D)."""
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x))
            return self.mlp_norm(x + self.mlp(x))
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class ViT(nn.Module):
    """Images (B, C, side, side) in, class logits (B, num_classes) out.

    The weights are drawn from the global random number generator: seed it for the same model again.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)
        self.position = nn.Parameter(torch.empty(config.num_patches, config.dim))  # (P, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        # after post-norm blocks the tokens are normalised already
        self.norm = _norm(config) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.dim, config.num_classes)
        nn.init.normal_(self.position, std=config.position_std)
        for module in self.modules():
            _init_weights(module, config)

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: (B, C, image_size, image_size), standardised, floating point.

        Returns:
            Logits, (B, num_classes).

        Raises:
            ValueError: `images` has another shape.
        """
        expected = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"expected images of shape (B, *{expected}), got {tuple(images.shape)}")
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, D, P) -> (B, P, D)
        x = x + self.position  # (B, P, D)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))  # (B, P, D) -> mean over patches (B, D) -> (B, num_classes)


def _norm(config: ViTConfig) -> nn.Module:
    return nn.Identity() if config.norm == "none" else nn.LayerNorm(config.dim)


def _init_weights(module: nn.Module, config: ViTConfig) -> None:
    if config.init == "torch" or not isinstance(module, nn.Linear | nn.Conv2d):
        return
    if config.init == "normal":
        nn.init.normal_(module.weight, std=config.init_std)
    elif config.init == "trunc_normal":
        cut = 2 * config.init_std
        nn.init.trunc_normal_(module.weight, std=config.init_std, a=-cut, b=cut)
    else:
        nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: patches count as inputs, as in a Linear
    if module.bias is not None:
        nn.init.zeros_(module.bias)
