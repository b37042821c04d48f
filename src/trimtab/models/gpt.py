"""A decoder-only Transformer for text, made to be read in one sitting; norm, MLP and start of weights are in parts.py.

Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019, with learned positions or rotary
ones (Su et al., arXiv 2104.09864). Query, key, value and output are four plain Linear layers, so that each has a
spectral norm of its own.

Shape letters: B batch, T tokens given, S tokens attended to (T, and those in the cache before them), H heads, D
features of the model, E = D / H features of a head, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.models.parts import MLP, Init, Norm, layer_norm, start_

Positions = Literal["learned", "rotary"]
Cache = list[list[Tensor]]
"""For each block nothing, or the keys and the values of all tokens so far, both (B, H, S, E)."""


@dataclass(frozen=True)
class GPTConfig:
    """What a `GPT` is made of.

    Attributes:
        vocab_size: number V of tokens. In a recipe: the most that its vocabulary may have, None for no limit.
        context: longest sequence T, in tokens.
        dim: features D of a token; a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads H in each block.
        mlp_ratio: hidden features of the MLP, in multiples of `dim`.
        norm: LayerNorm before each half of a block and before the head ("pre"), after each residual sum
            ("post", as in Vaswani et al., 2017), or nowhere ("none").
        positions: a "learned" embedding that is added to the tokens, or "rotary", queries and keys that are rotated.
        tied: whether the head's weight is the token embedding's.
        dropout: share of zeros in the tokens before the first block, and in what each half of a block adds.
        init: where the weights of Linear layers start: PyTorch's own default ("torch"), N(0, init_std²) ("normal"),
            the same cut off at two standard deviations ("trunc_normal"), or Glorot's uniform ("xavier"). Biases start
            at zero, except with "torch".
        init_std: standard deviation for "normal" and "trunc_normal"; the other two do not use it.
        embedding_std: standard deviation of the token embedding at the start, and of a tied head.
        position_std: standard deviation of the learned position embedding at the start.
        residual_gain: factor at the start on the weights whose outputs are added to the residual stream;
            (2 · depth)^-½ in GPT-2.

    Raises:
        RecipeError: a field is out of range, or two of them do not fit together.
    """

    vocab_size: int | None
    context: int
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: int = 4
    norm: Norm = "pre"
    positions: Positions = "learned"
    tied: bool = True
    dropout: float = 0.0
    init: Init = "normal"
    init_std: float = 0.02
    embedding_std: float = 0.02
    position_std: float = 0.02
    residual_gain: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "dim", "depth", "num_heads", "mlp_ratio"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1, got {value}")
        for name, choices in (("norm", get_args(Norm)), ("positions", get_args(Positions)), ("init", get_args(Init))):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("init_std", "embedding_std", "position_std", "residual_gain"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} must be a positive number, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.dim % self.num_heads:
            raise RecipeError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; heads are all of one size"
            )
        if self.positions == "rotary" and self.dim // self.num_heads % 2:
            raise RecipeError(
                f"rotary positions turn pairs of features: dim / num_heads must be even, got {self.dim} / "
                f"{self.num_heads}"
            )


class Attention(nn.Module):
    """Multi-head causal self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.rotary = config.positions == "rotary"
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Attend from every token to itself and those before it.

        Args:
            x: (B, T, D).
            cache: this block's keys and values of earlier tokens, of which `x` is then the one that follows; those of
                `x` are added to it.

        Returns:
            (B, T, D).
        """
        heads = (self.num_heads, -1)
        # (B, T, D) -> (B, T, H, E) -> (B, H, T, E), three times
        query = self.query(x).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x).unflatten(-1, heads).transpose(1, 2)
        value = self.value(x).unflatten(-1, heads).transpose(1, 2)
        if self.rotary:
            start = cache[0].shape[2] if cache else 0
            query, key = rotate(query, start), rotate(key, start)
        if cache is not None:
            if cache:  # (B, H, S, E)
                key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
            cache[:] = [key, value]
        # a single new token may see all there is
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] == key.shape[2])
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, T, E) -> (B, T, H, E) -> (B, T, D)


class Block(nn.Module):
    """Attention, then MLP, each with a residual connection and its norm where the config puts it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.post_norm = config.norm == "post"
        self.attention_norm = layer_norm(config.norm, config.dim)
        self.attention = Attention(config)
        self.mlp_norm = layer_norm(config.norm, config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio * config.dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Run the block; x and the result are (B, T, D), `cache` is as of `Attention`."""
        if self.post_norm:
            x = self.attention_norm(x + self.drop(self.attention(x, cache)))
            return self.mlp_norm(x + self.drop(self.mlp(x)))
        x = x + self.drop(self.attention(self.attention_norm(x), cache))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Tokens (B, T) in, logits of the token after each of them (B, T, V) out.

    The weights are drawn from the global random number generator: seed it for the same model again.

    Raises:
        RecipeError: the config has no `vocab_size`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise RecipeError("a GPT needs a vocab_size: how many tokens there are")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        learned = config.positions == "learned"
        self.position = nn.Parameter(torch.empty(config.context, config.dim)) if learned else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        # after post-norm blocks the tokens are normalised already
        self.norm = layer_norm(config.norm, config.dim) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, module in self.named_modules():
            adds = name.endswith(("attention.out", "mlp.down"))
            start_(module, config.init, config.init_std, config.residual_gain if adds else 1.0)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if self.position is not None:
            nn.init.normal_(self.position, std=config.position_std)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Tell which token follows each.

        Args:
            tokens: (B, T), int64; no more than `context` with those in the cache.
            cache: what `empty_cache` made, or earlier calls have filled: one token at a time may then follow.

        Returns:
            Logits, (B, T, V).

        Raises:
            ValueError: `tokens` has another shape, there are too many, or several follow those in the cache.
        """
        before = cache[0][0].shape[2] if cache and cache[0] else 0
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.context - before:
            room = self.config.context - before
            raise ValueError(f"expected tokens of shape (B, T), T from 1 to {room}; got {tuple(tokens.shape)}")
        if before and tokens.shape[1] > 1:
            raise ValueError(f"one token at a time may follow those in the cache, got {tokens.shape[1]}")
        x = self.embedding(tokens)  # (B, T, D)
        if self.position is not None:
            x = x + self.position[before : before + tokens.shape[1]]
        x = self.drop(x)
        for index, block in enumerate(self.blocks):
            x = block(x) if cache is None else block(x, cache[index])
        logits: Tensor = self.head(self.norm(x))
        return logits

    def empty_cache(self) -> Cache:
        """What `forward` keeps the keys and values of the tokens in."""
        return [[] for _ in self.blocks]


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """Turn pairs of features by an angle that grows with the position (Su et al., arXiv 2104.09864, equation 34).

    Feature i of the first half and feature i of the second are a pair; it turns by ``10000^(-2i/E)`` a position.

    Args:
        x: queries or keys, (B, H, T, E).
        start: position of the first of them.
    """
    half = x.shape[-1] // 2
    # at least float32, also under autocast: bfloat16 does not tell position 256 from 257
    dtype = torch.promote_types(x.dtype, torch.float32)
    turn = 10000.0 ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    place = torch.arange(start, start + x.shape[-2], device=x.device, dtype=dtype)
    angle = place[:, None] * turn  # (T, E / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
