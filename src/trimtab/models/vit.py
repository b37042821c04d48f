"""A Vision Transformer, made to be read in one sitting; norm, MLP and start of weights are in parts.py.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929, with the mean over patches or a
class token, and the stochastic depth of DeiT (Touvron et al., ICML 2021, arXiv 2012.12877).
Query, key, value and output are four plain Linear layers, so that each has a spectral norm of its own.

Shape letters: B batch, C channels, P patches, T tokens (the patches, and the class token if there is one; the L and S
of the attention), H heads, D features of the model, E = D / H features of a head.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.models.drop_path import DropPath
from trimtab.models.parts import MLP, Init, Norm, layer_norm, start_

Pool = Literal["mean", "cls"]
Size = Literal["Ti", "S", "B", "L", "H"]


@dataclass(frozen=True)
class ViTConfig:
    """What a `ViT` is made of.

    Attributes:
        image_size: side of the square images, in pixels.
        patch_size: side of the square patches, in pixels; divides `image_size`.
        in_channels: colour channels C.
        num_classes: number of logits; 0 for no head, so that the features come out.
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
        position_std: standard deviation of the learned position embedding, and class token, at the start.
        pool: what stands for the image: the mean over the patches ("mean"), or a learned token beside them, with a
            position of its own ("cls").
        dropout: share of zeros in the tokens before the first block, and in what each half of a block adds.
        drop_path: probability with which an example leaves out a half of the last block; it rises linearly from 0 in
            the first one.
        patch_gain: factor on the weights of the patch embedding at the start.
        qkv_bias: whether query, key and value have biases.

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
    pool: Pool = "mean"
    dropout: float = 0.0
    drop_path: float = 0.0
    patch_gain: float = 1.0
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        sizes = (
            "image_size",
            "patch_size",
            "in_channels",
            "dim",
            "depth",
            "num_heads",
            "mlp_ratio",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_classes < 0:
            raise RecipeError(f"num_classes must be at least 0, got {self.num_classes}")
        for name, choices in (("norm", get_args(Norm)), ("init", get_args(Init)), ("pool", get_args(Pool))):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("init_std", "position_std", "patch_gain"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} must be a positive number, got {getattr(self, name)}")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
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
        """Number P of patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Length T of the sequence: the patches, and the class token if there is one."""
        return self.num_patches + (self.pool == "cls")


_SIZES: dict[Size, dict[str, int]] = {
    "Ti": {"dim": 192, "depth": 12, "num_heads": 3},
    "S": {"dim": 384, "depth": 12, "num_heads": 6},
    "B": {"dim": 768, "depth": 12, "num_heads": 12},
    "L": {"dim": 1024, "depth": 24, "num_heads": 16},
    "H": {"dim": 1280, "depth": 32, "num_heads": 16},
}  # B, L, H: Dosovitskiy et al., table 1; Ti and S: Touvron et al., table 1


def vit_config(size: Size, **changes: Any) -> ViTConfig:
    """A ViT of a published size, for ImageNet: 224 pixels, patches of 16 (H: 14), 1,000 classes.

    Args:
        size: "Ti", "S", "B", "L" or "H": 5.7, 22, 87, 304 or 632 million parameters.
        changes: any field of `ViTConfig`, in place of these.

    Raises:
        RecipeError: the size is unknown, or the fields do not fit together.
    """
    if size not in _SIZES:
        raise RecipeError(f"size must be one of {', '.join(_SIZES)}; got {size!r}")
    patch_size = 14 if size == "H" else 16
    fields = {"image_size": 224, "patch_size": patch_size, "in_channels": 3, "num_classes": 1000, **_SIZES[size]}
    return ViTConfig(**{**fields, **changes})


class Attention(nn.Module):
    """Multi-head self-attention over T tokens, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.dim, config.dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.dim, config.dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.dim, config.dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token; x and the result are (B, T, D)."""
        heads = (self.num_heads, -1)
        # (B, T, D) -> (B, T, H, E) -> (B, H, T, E), three times
        query = self.query(x).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)
        value = self.value(x).unflatten(-1, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, H, T, E)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, T, E) -> (B, T, H, E) -> (B, T, D)


class Block(nn.Module):
    """Attention, then MLP, each with a residual connection and its norm where the config puts it."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        self.post_norm = config.norm == "post"
        self.attention_norm = layer_norm(config.norm, config.dim)
        self.attention = Attention(config)
        self.mlp_norm = layer_norm(config.norm, config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio * config.dim)
        self.drop = nn.Sequential(nn.Dropout(config.dropout), DropPath(drop_path))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; x and the result are (B, T, D)."""
        if self.post_norm:
            x = self.attention_norm(x + self.drop(self.attention(x)))
            return self.mlp_norm(x + self.drop(self.mlp(x)))
        x = x + self.drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class ViT(nn.Module):
    """Images (B, C, side, side) in, class logits (B, num_classes) out, or features (B, D) if there are no classes.

    The weights are drawn from the global random number generator: seed it for the same model again.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(config.in_channels, config.dim, config.patch_size, stride=config.patch_size)
        # of one dimension, as everything that does not decay
        self.class_token = nn.Parameter(torch.empty(config.dim)) if config.pool == "cls" else None
        self.position = nn.Parameter(torch.empty(config.num_tokens, config.dim))  # (T, D), the class token's first
        self.drop = nn.Dropout(config.dropout)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        # after post-norm blocks the tokens are normalised already
        self.norm = layer_norm(config.norm, config.dim) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()
        nn.init.normal_(self.position, std=config.position_std)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=config.position_std)
        for module in self.modules():
            start_(module, config.init, config.init_std)
        with torch.no_grad():
            self.patches.weight.mul_(config.patch_gain)

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: (B, C, image_size, image_size), standardised, floating point.

        Returns:
            Logits, (B, num_classes); the features, (B, D), if `num_classes` is 0.

        Raises:
            ValueError: `images` has another shape.
        """
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """What the head sees of images (B, C, image_size, image_size): normalised and pooled, (B, D).

        Raises:
            ValueError: `images` has another shape.
        """
        expected = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"expected images of shape (B, *{expected}), got {tuple(images.shape)}")
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, D, P) -> (B, P, D)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + P, D)
        x = self.drop(x + self.position)  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0] if self.class_token is not None else x.mean(dim=1)  # (B, T, D) -> (B, D)
