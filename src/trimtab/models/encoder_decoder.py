"""An encoder-decoder Transformer for translation, made to be read in one sitting; norm, MLP and start are in parts.py.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv 1706.03762, of any depth, post-LN as there, pre-LN or
without norms. Query, key, value and output are four plain Linear layers, so that each has a spectral norm of its own.

Shape letters: B batch, S source tokens, T target tokens, L tokens that attend, H heads, D features of the model,
E = D / H features of a head, V tokens of the target vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import RecipeError
from trimtab.models.parts import MLP, Activation, Init, Norm, layer_norm, start_

Tied = Literal["all", "decoder", "none"]
KeysValues = tuple[Tensor, Tensor]
"""Keys and values of all heads, each (B, H, L, E)."""


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """What an `EncoderDecoder` is made of.

    Attributes:
        source_vocab: tokens of the source vocabulary.
        target_vocab: tokens V of the target vocabulary.
        dim: features D of a token; even, and a multiple of `num_heads`.
        encoder_depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        num_heads: attention heads H in each block.
        mlp_ratio: hidden features of the MLP, in multiples of `dim`.
        norm: LayerNorm after each residual sum ("post", as in Vaswani et al.), before each branch and after the last
            block ("pre"), or nowhere ("none").
        tied: which weights are one: both embeddings and the head ("all", for a joint vocabulary), the target's
            embedding and the head ("decoder"), or none.
        activation: between the two layers of the MLP.
        dropout: share of zeros in the embeddings and in what each branch adds.
        init: where the weights of Linear layers start: PyTorch's own default ("torch"), N(0, init_std²) ("normal"), the
            same cut off at two standard deviations ("trunc_normal"), or Glorot's uniform ("xavier"). Biases start at
            zero, except with "torch".
        init_std: standard deviation for "normal" and "trunc_normal"; the other two do not use it.
        embedding_std: of the embeddings at the start; None for 1 / sqrt(dim), with which the scaled embeddings have
            about the size of the positions. A tied head starts as its embedding does.
        pad: the token that fills up short sentences; none of their own, and never attended to.

    Raises:
        RecipeError: a field is out of range, or two of them do not fit together.
    """

    source_vocab: int
    target_vocab: int
    dim: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    mlp_ratio: int = 4
    norm: Norm = "post"
    tied: Tied = "all"
    activation: Activation = "relu"
    dropout: float = 0.1
    init: Init = "xavier"
    init_std: float = 0.02
    embedding_std: float | None = None
    pad: int = 0

    def __post_init__(self) -> None:
        sizes = ("source_vocab", "target_vocab", "dim", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio")
        for name in sizes:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices = {"norm": Norm, "init": Init, "tied": Tied, "activation": Activation}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise RecipeError(f"{name} must be one of {', '.join(get_args(kind))}; got {getattr(self, name)!r}")
        for name in ("init_std", "embedding_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{name} must be a positive number, got {value}")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.dim % self.num_heads:
            raise RecipeError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; heads are all of one size"
            )
        if self.dim % 2:
            raise RecipeError(f"dim must be even, half of it for sines and half for cosines; got {self.dim}")
        if self.tied == "all" and self.source_vocab != self.target_vocab:
            raise RecipeError(
                f"tied embeddings have one joint vocabulary: source_vocab {self.source_vocab} and target_vocab "
                f"{self.target_vocab} must be equal, or tied be decoder or none"
            )


@dataclass
class Kept:
    """What a decoder block keeps from one token to the next.

    Attributes:
        own: keys and values of the target tokens so far.
        source: keys and values of the source.
    """

    own: KeysValues | None = None
    source: KeysValues | None = None


class Cache:
    """What an `EncoderDecoder` keeps while it decodes one token after the other; made empty, and filled by it.

    Attributes:
        blocks: of the decoder.
        mask: which source tokens may be attended to, (B, 1, 1, S), bool; None before the first call.
        length: target tokens so far.
    """

    def __init__(self) -> None:
        self.blocks: list[Kept] = []
        self.mask: Tensor | None = None
        self.length = 0

    def select_(self, rows: Tensor, same_sources: bool = False) -> None:
        """Keep some rows of the batch, each any number of times.

        Args:
            rows: which, (R,), int64.
            same_sources: whether every row gets one of the same source, so that what is kept of those need not move.
        """
        for kept in self.blocks:
            kept.own = _rows_of(kept.own, rows)
            kept.source = kept.source if same_sources else _rows_of(kept.source, rows)
        if self.mask is not None and not same_sources:
            self.mask = self.mask[rows]


def _rows_of(pair: KeysValues | None, rows: Tensor) -> KeysValues | None:
    return None if pair is None else (pair[0][rows], pair[1][rows])


class Attention(nn.Module):
    """Multi-head attention from L tokens to some keys and values."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def keys_values(self, x: Tensor) -> KeysValues:
        """Keys and values of tokens (B, L, D), each (B, H, L, E)."""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def forward(
        self, x: Tensor, keys_values: KeysValues, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend from x, (B, L, D), to keys and values (B, H, S, E); the result is (B, L, D).

        Args:
            x: what attends.
            keys_values: what is attended to.
            mask: what may be, bool, broadcastable to (B, H, L, S); None for all.
            is_causal: whether token i attends to the first i + 1 only.
        """
        query = self._heads(self.query(x))  # (B, H, L, E)
        mixed = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask, is_causal=is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, H, L, E) -> (B, L, H, E) -> (B, L, D)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, L, H, E) -> (B, H, L, E)


class EncoderBlock(nn.Module):
    """Attention, then MLP, each with a residual connection and its norm where the config puts it."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.post_norm = config.norm == "post"
        self.attention_norm = layer_norm(config.norm, config.dim)
        self.attention = Attention(config)
        self.mlp_norm = layer_norm(config.norm, config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio * config.dim, config.activation)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run the block; x and the result are (B, S, D), mask is (B, 1, 1, S)."""
        x = self.add(x, lambda x: self.attention(x, self.attention.keys_values(x), mask), self.attention_norm)
        return self.add(x, self.mlp, self.mlp_norm)

    def add(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        """Add what a branch makes of x, (B, L, D), with its norm before the branch or after the sum."""
        if self.post_norm:
            return norm(x + self.drop(branch(x)))
        return x + self.drop(branch(norm(x)))


class DecoderBlock(EncoderBlock):
    """Causal attention, then attention to the source, then MLP."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config)
        self.cross_attention_norm = layer_norm(config.norm, config.dim)
        self.cross_attention = Attention(config)

    def forward(  # type: ignore[override]  # it shares the encoder block's parts, and is never called as one
        self, x: Tensor, memory: Tensor | None, mask: Tensor, kept: Kept | None = None
    ) -> Tensor:
        """Run the block.

        Args:
            x: target tokens, (B, T, D); those that are new, if others are kept.
            memory: what the encoder made of the source, (B, S, D); None if its keys and values are kept.
            mask: which source tokens may be attended to, (B, 1, 1, S).
            kept: where keys and values are kept; None keeps none.
        """
        kept = Kept() if kept is None else kept
        x = self.add(x, lambda x: self._attend(x, kept), self.attention_norm)
        x = self.add(x, lambda x: self._attend_to_source(x, memory, mask, kept), self.cross_attention_norm)
        return self.add(x, self.mlp, self.mlp_norm)

    def _attend(self, x: Tensor, kept: Kept) -> Tensor:
        before, now = kept.own, self.attention.keys_values(x)
        if before is not None:
            now = (torch.cat([before[0], now[0]], dim=2), torch.cat([before[1], now[1]], dim=2))
        kept.own = now
        return self.attention(x, now, is_causal=before is None)

    def _attend_to_source(self, x: Tensor, memory: Tensor | None, mask: Tensor, kept: Kept) -> Tensor:
        if memory is not None:
            kept.source = self.cross_attention.keys_values(memory)
        return self.cross_attention(x, kept.source, mask)


class EncoderDecoder(nn.Module):
    """Source tokens (B, S) and target tokens (B, T) in, logits of the token after each target token (B, T, V) out.

    Padding comes last in a sentence. It is never attended to, so that a sentence has the same logits in any batch;
    logits at the padding's own places mean nothing. Positions are Vaswani's sinusoids, without a longest sentence. The
    weights are drawn from the global random number generator: seed it for the same model again.
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.source_embedding = nn.Embedding(config.source_vocab, config.dim)
        self.target_embedding = (
            self.source_embedding if config.tied == "all" else nn.Embedding(config.target_vocab, config.dim)
        )
        self.drop = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        # after post-norm blocks the tokens are normalised already
        self.encoder_norm = layer_norm(config.norm, config.dim) if config.norm == "pre" else nn.Identity()
        self.decoder_norm = layer_norm(config.norm, config.dim) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.dim, config.target_vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=config.embedding_std or config.dim**-0.5)
            start_(module, config.init, config.init_std)
        if config.tied != "none":
            self.head.weight = self.target_embedding.weight

    def forward(self, source: Tensor, target: Tensor, cache: Cache | None = None) -> Tensor:
        """Tell the logits of the token that follows each target token.

        Args:
            source: (B, S), int64, filled up at the end with `config.pad`; every sentence has a token of its own.
            target: (B, T), int64. With a cache: the tokens after those of the calls before, one unless it is empty.
            cache: keeps what the calls for the following tokens need; the source is looked at in the first one only.

        Returns:
            Logits, (B, T, V).

        Raises:
            ValueError: several target tokens follow others in a cache.
        """
        begin = 0 if cache is None else cache.length
        if begin and target.shape[1] > 1:
            raise ValueError(f"with a cache that is not empty targets come one at a time, got {target.shape[1]}")
        memory, mask = None, None if cache is None else cache.mask
        if mask is None:
            mask = (source != self.config.pad)[:, None, None, :]  # (B, 1, 1, S)
            memory = self._embedded(self.source_embedding, source, 0)
            for block in self.encoder:
                memory = block(memory, mask)
            memory = self.encoder_norm(memory)
        x = self._embedded(self.target_embedding, target, begin)  # (B, T, D)
        if cache is not None:
            cache.blocks, cache.mask = cache.blocks or [Kept() for _ in self.decoder], mask
            cache.length += target.shape[1]
        for number, block in enumerate(self.decoder):
            x = block(x, memory, mask, None if cache is None else cache.blocks[number])
        logits: Tensor = self.head(self.decoder_norm(x))
        return logits

    def _embedded(self, embedding: nn.Module, tokens: Tensor, begin: int) -> Tensor:
        """Embeddings, scaled as in Vaswani et al., section 3.4, with positions from `begin` on."""
        x = embedding(tokens) * math.sqrt(self.config.dim)
        positions = sinusoids(begin, begin + tokens.shape[1], self.config.dim, tokens.device)
        x = self.drop(x + positions.to(x.dtype))
        return x


def sinusoids(begin: int, end: int, dim: int, device: torch.device | None = None) -> Tensor:
    """The positions from `begin` up to `end`, (end - begin, dim), float32: sines and cosines in turn.

    Vaswani et al., section 3.5: ``sin(p / 10000^(2i/dim))`` at 2i and the cosine at 2i + 1.
    """
    position = torch.arange(begin, end, device=device, dtype=torch.float32)
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10_000.0) / dim))
    angle = position[:, None] * frequency  # (positions, dim / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
