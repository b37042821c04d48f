"""A speech encoder, made to be read in one sitting: features of audio in, logits for CTC out.

The model that Zhai et al. (ICML 2023, arXiv 2303.06296) train on LibriSpeech: one strided convolution with a gated
linear unit, continuous augmented sinusoidal positions, and Transformer blocks (Vaswani et al., arXiv 1706.03762) with
ReLU and layer-drop. Query, key, value and output are four plain Linear layers, so that each has a spectral norm of its
own. Norm, MLP and start of weights are in parts.py.

Utterances of a batch are padded to the longest. What is padded is hidden from what is not: the logits of an utterance
are the same alone and in a batch.

Shape letters: B batch, T frames that come in, L frames that go out (T / stride, rounded up; the L and S of the
attention), F features of a frame, D features of the model, H heads, E = D / H features of a head, V labels.
"""

from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.models.parts import MLP, Init, Norm, layer_norm, start_


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """What a `SpeechEncoder` is made of.

    Attributes:
        in_features: features F of a frame, such as its mel bins.
        num_labels: labels V, CTC's blank among them.
        dim: features D of the model; even, and a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads H in each block.
        mlp_dim: hidden features of the MLP.
        kernel: frames that the convolution sees at once; odd.
        stride: frames that come in for each that goes out.
        norm: LayerNorm before each half of a block and before the head ("pre"), after each residual sum
            ("post", as in Vaswani et al., 2017), or nowhere ("none").
        bias: whether the layers of the blocks have biases; the convolution and the head have them in any case.
        dropout: share of zeros in what the blocks get, and in what each half of a block adds.
        layer_drop: probability with which an utterance goes past a block, in training.
        global_shift: by how many outgoing frames, up or down, the positions of an utterance move in training.
        local_shift: by how many outgoing frames, up or down, each position moves by itself; below 0.5 they keep
            their order.
        global_scale: by which factor at most the positions of an utterance stretch or shrink; 1 for none.
        init: where the weights of Linear and Conv1d layers start: PyTorch's own default ("torch"),
            N(0, init_std²) ("normal"), the same cut off at two standard deviations ("trunc_normal"), or
            Glorot's uniform ("xavier"). Biases start at zero, except with "torch".
        init_std: standard deviation for "normal" and "trunc_normal"; the other two do not use it.

    Raises:
        RecipeError: a field is out of range, or two of them do not fit together.
    """

    in_features: int
    num_labels: int
    dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    kernel: int = 7
    stride: int = 3
    norm: Norm = "pre"
    bias: bool = False
    dropout: float = 0.0
    layer_drop: float = 0.0
    global_shift: float = 0.0
    local_shift: float = 0.0
    global_scale: float = 1.0
    init: Init = "xavier"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("in_features", "dim", "depth", "num_heads", "mlp_dim", "kernel", "stride"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_labels < 2:
            raise RecipeError(f"num_labels must be at least 2, the blank and one more; got {self.num_labels}")
        for name, choices in (("norm", get_args(Norm)), ("init", get_args(Init))):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("dropout", "layer_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name, least in (("global_shift", 0), ("local_shift", 0), ("global_scale", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.init_std < float("inf"):
            raise RecipeError(f"init_std must be a positive number, got {self.init_std}")
        if self.kernel % 2 == 0 or self.kernel < self.stride:
            raise RecipeError(
                f"kernel must be odd and at least the stride {self.stride}, so that every frame is seen and the "
                f"middle one counts; got {self.kernel}"
            )
        if self.dim % self.num_heads or self.dim % 2:
            raise RecipeError(
                f"dim {self.dim} is not an even multiple of num_heads {self.num_heads}: heads are all of one size, "
                "and positions are pairs of a sine and a cosine"
            )

    def frames_out(self, frames: Tensor) -> Tensor:
        """How many frames go out for so many that come in, (B,) or any shape, int64."""
        return (frames + self.stride - 1) // self.stride


class Positions(nn.Module):
    """Continuous augmented sinusoidal positions, CAPE (Likhomanenko et al., NeurIPS 2021, arXiv 2106.03143).

    Sines and cosines of positions on a line, counted in frames from the middle of the utterance. In training the
    positions p of an utterance become s (p + shift + jitter): a shift and the logarithm of a scale s that are uniform
    for the utterance, and a jitter that is uniform for each frame. In eval mode p stays p.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Add the positions to x (B, L, D), of which utterances have `lengths` (B,) frames."""
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32  # bfloat16 cannot count to 1,000
        middle = (lengths.to(exact) - 1).unsqueeze(1) / 2  # (B, 1)
        at = torch.arange(x.shape[1], device=x.device, dtype=exact) - middle  # (B, L)
        if self.training:
            config = self.config
            if config.global_shift:
                at = at + _uniform(middle, config.global_shift)
            if config.local_shift:
                at = at + _uniform(at, config.local_shift)
            if config.global_scale > 1:
                at = at * config.global_scale ** _uniform(middle, 1.0)
        pairs = torch.arange(0, x.shape[2], 2, device=x.device, dtype=exact) / x.shape[2]  # (D / 2,)
        angles = at.unsqueeze(-1) * 10000.0**-pairs  # (B, L, D / 2), radians
        return x + torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over the L frames of each utterance, (B, L, D) -> (B, L, D)."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.key = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.value = nn.Linear(config.dim, config.dim, bias=config.bias)
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Attend from every frame to those that are `visible`, (B, 1, 1, L), bool; x and the result are (B, L, D)."""
        heads = (self.num_heads, -1)
        # (B, L, D) -> (B, L, H, E) -> (B, H, L, E), three times
        query = self.query(x).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)
        value = self.value(x).unflatten(-1, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)  # (B, H, L, E)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, L, E) -> (B, L, H, E) -> (B, L, D)


class Block(nn.Module):
    """Attention, then MLP, each with a residual connection and its norm where the config puts it.

    Layer-drop (Fan et al., ICLR 2020, arXiv 1909.11556): in training an utterance goes past both halves with some
    probability. It is drawn for each utterance, not for the batch, so that every weight has a gradient in each step, as
    training in several processes expects. Nothing is scaled up for it.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.post_norm = config.norm == "post"
        self.layer_drop = config.layer_drop
        self.attention_norm = layer_norm(config.norm, config.dim)
        self.attention = Attention(config)
        self.mlp_norm = layer_norm(config.norm, config.dim)
        self.mlp = MLP(config.dim, config.mlp_dim, "relu", config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Run the block; x and the result are (B, L, D), `visible` is (B, 1, 1, L), bool."""
        kept = self._kept(x)
        if self.post_norm:
            x = self.attention_norm(x + kept * self.drop(self.attention(x, visible)))
            return self.mlp_norm(x + kept * self.drop(self.mlp(x)))
        x = x + kept * self.drop(self.attention(self.attention_norm(x), visible))
        return x + kept * self.drop(self.mlp(self.mlp_norm(x)))

    def _kept(self, x: Tensor) -> Tensor | float:
        """1 for utterances that take the block, 0 for those that go past it, (B, 1, 1)."""
        if not self.training or self.layer_drop == 0:
            return 1.0
        return (torch.rand(len(x), 1, 1, device=x.device) >= self.layer_drop).to(x.dtype)


class SpeechEncoder(nn.Module):
    """Features of utterances (B, T, F) in, logits of labels (B, L, V) out.

    The weights are drawn from the global random number generator: seed it for the same model again.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.frames = nn.Conv1d(
            config.in_features, 2 * config.dim, config.kernel, stride=config.stride, padding=config.kernel // 2
        )
        self.positions = Positions(config)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        # after post-norm blocks the frames are normalised already
        self.norm = layer_norm(config.norm, config.dim) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.dim, config.num_labels)
        for module in self.modules():
            start_(module, config.init, config.init_std)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances.

        Args:
            features: (B, T, F), floating point, about of mean 0 and deviation 1. What lies beyond an utterance's length
                is not looked at.
            lengths: (B,), int64, frames of each utterance, from 1 to T.

        Returns:
            Logits, (B, L, V), and how many of them are each utterance's, (B,), int64. Those beyond mean nothing.

        Raises:
            ValueError: `features` or `lengths` has another shape.
        """
        if features.ndim != 3 or features.shape[2] != self.config.in_features or lengths.shape != features.shape[:1]:
            raise ValueError(
                f"expected features of shape (B, T, {self.config.in_features}) and lengths of shape (B,), got "
                f"{tuple(features.shape)} and {tuple(lengths.shape)}"
            )
        beyond = _within(lengths, features.shape[1]).logical_not()  # (B, T)
        features = features.masked_fill(beyond.unsqueeze(-1), 0)  # as the convolution's own padding is
        x = F.glu(self.frames(features.transpose(1, 2)), dim=1).transpose(1, 2)  # (B, F, T) -> (B, D, L) -> (B, L, D)
        lengths = self.config.frames_out(lengths)
        x = self.drop(self.positions(x.to(features.dtype), lengths))  # under autocast the sums stay in float32
        visible = _within(lengths, x.shape[1])[:, None, None]  # (B, 1, 1, L)
        for block in self.blocks:
            x = block(x, visible)
        return self.head(self.norm(x)), lengths


def _within(lengths: Tensor, longest: int) -> Tensor:
    """Which of `longest` frames are within each length (B,), (B, longest), bool."""
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)


def _uniform(like: Tensor, largest: float) -> Tensor:
    return (2 * torch.rand_like(like) - 1) * largest
