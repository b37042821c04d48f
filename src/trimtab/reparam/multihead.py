"""nn.MultiheadAttention with sigma-Reparam on its projections.

torch's own forward hands ``in_proj_weight`` and ``out_proj.weight`` to a fused function that knows nothing of gamma,
so the converted class has a forward of its own: the same arguments, masks and results, and one path for training and
evaluation. Query, key and value each have their own sigma, packed or not, unless other blocks are asked for. The
same forward serves where nothing has a sigma but the heads have norms or a soft cap (`trimtab.stabilizers`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.attention.softcap import softcapped_attention
from trimtab.reparam.functional import scaled_linear
from trimtab.reparam.layers import Reparametrized
from trimtab.spectral import Sizes, per_row


class MultiheadAttention(Reparametrized):
    """Mixin for nn.MultiheadAttention; ``out_proj`` is a child layer, converted (or not) by itself."""

    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Module
    softcap: float | None = None  # c: logits s are used as c tanh(s / c)

    @property
    def needs_own_forward(self) -> bool:
        """Whether torch's forward would not do even without gamma: a soft cap or norms of the heads are there."""
        return self.softcap is not None or "query_norm" in self._modules

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See nn.MultiheadAttention: query (L, B, E) or (B, L, E) with batch_first, or (L, E) unbatched."""
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
            raise ValueError(
                "expected query, key and value all of 3 dimensions, or all of 2 for unbatched input; got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if query.is_nested:
            raise ValueError("expected dense tensors, got nested ones: convert the whole nn.TransformerEncoder")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is only a hint about attn_mask: pass the mask as well")
        batched = query.ndim == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            mask = self._additive_mask(attn_mask, key_padding_mask, q.shape[0], q.shape[1], k.shape[1], q.dtype)
            is_causal = False
        k, v, mask = self._with_extra_keys(k, v, mask)
        q, k, v = self._split_heads(q), self._split_heads(k), self._split_heads(v)  # (B, H, L or S, D)
        dropout = self.dropout if self.training else 0.0
        if self.softcap is not None:
            heads, weights = softcapped_attention(q, k, v, self.softcap, mask, dropout, is_causal)
        elif need_weights:
            logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = F.dropout(torch.softmax(logits if mask is None else logits + mask, dim=-1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, L, E)
        if batched and not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output if batched else output.squeeze(0), None
        weights = weights.mean(1) if average_attn_weights else weights
        return (output, weights) if batched else (output.squeeze(0), weights.squeeze(0))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._projections(query, key, value)
        return self._normalized(q, "query_norm"), self._normalized(k, "key_norm"), v

    def _normalized(self, x: Tensor, name: str) -> Tensor:
        norm = self._modules.get(name)
        return x if norm is None else norm(x.unflatten(-1, (self.num_heads, -1))).flatten(-2).to(x.dtype)

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is None:
            q_bias, k_bias, v_bias = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            return (
                self._linear(query, "q_proj_weight", q_bias),
                self._linear(key, "k_proj_weight", k_bias),
                self._linear(value, "v_proj_weight", v_bias),
            )
        if query is key and key is value:
            q, k, v = self._linear(query, "in_proj_weight", self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        inputs = (query, key, value)
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if "in_proj_weight" not in self._carried_sizes:
            q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
            return q, k, v
        c = self.carried("in_proj_weight")
        thirds = _thirds(c.sizes)
        if thirds is None:  # one sigma of rows that meet different inputs
            c = c.replicated()
            scales = per_row(c.gamma / c.sigma(), c.sizes).expand(3 * self.embed_dim).chunk(3)
            q, k, v = (_scaled_output(*each) for each in zip(inputs, weights, biases, scales, strict=True))
            return q, k, v
        counts = [len(sizes) for sizes in thirds]
        carried = zip(c.gamma.split(counts), c.u.split(counts), c.v.chunk(3), thirds, strict=True)
        q, k, v = (scaled_linear(x, w, b, *own) for x, w, b, own in zip(inputs, weights, biases, carried, strict=True))
        return q, k, v

    def _linear(self, input: Tensor, weight_name: str, bias: Tensor | None) -> Tensor:
        if weight_name not in self._carried_sizes:
            return F.linear(input, getattr(self, weight_name), bias)
        c = self.carried(weight_name)
        return scaled_linear(input, c.matrix, bias, c.gamma, c.u, c.v, c.sizes)

    def _additive_mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        batch: int,
        queries: int,
        keys: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Merge both masks (True or -inf: do not attend) into one to be added, broadcastable to (B, H, L, S)."""
        merged = None
        if attn_mask is not None:
            if tuple(attn_mask.shape) not in ((queries, keys), (batch * self.num_heads, queries, keys)):
                raise ValueError(
                    f"attn_mask: expected shape {(queries, keys)} or {(batch * self.num_heads, queries, keys)}, "
                    f"got {tuple(attn_mask.shape)}"
                )
            merged = _additive(attn_mask, dtype)
            if merged.ndim == 3:
                merged = merged.view(batch, self.num_heads, queries, keys)
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, keys):
                raise ValueError(
                    f"key_padding_mask: expected shape {(batch, keys)}, got {tuple(key_padding_mask.shape)}"
                )
            padding = _additive(key_padding_mask, dtype)[:, None, None, :]
            merged = padding if merged is None else merged + padding
        return merged

    def _with_extra_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned key and value (bias_k, bias_v) and the zero key and value, seen by every query."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], dim=1)
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        return k, v, mask if mask is None or not extra else F.pad(mask, (0, extra))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, E) -> (B, H, L, D)


def _thirds(sizes: Sizes) -> list[Sizes] | None:
    """Return the row blocks in each third of the rows, or None if one reaches across two."""
    third, end = sum(sizes) // 3, 0
    found: list[Sizes] = [(), (), ()]
    for size in sizes:
        first, last = end // third, (end + size - 1) // third
        if first != last:
            return None
        found[first] += (size,)
        end += size
    return found


def _scaled_output(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    output = F.linear(input, weight)
    output = (output * scale).to(output.dtype)
    return output if bias is None else output + bias.to(output.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise ValueError(f"expected a boolean or floating mask, got {mask.dtype}")
    return mask.to(dtype)


def projection_weights(module: nn.MultiheadAttention) -> list[str]:
    """Return the names of the input projections of an attention module."""
    return ["in_proj_weight"] if module._qkv_same_embed_dim else [f"{part}_proj_weight" for part in "qkv"]
