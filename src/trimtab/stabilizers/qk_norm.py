"""`qk-norm`: queries and keys of each head are normalised before they meet."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.reparam import fastpath
from trimtab.reparam.heads import HeadRows
from trimtab.stabilizers.clipper import refuse_clipped
from trimtab.stabilizers.places import attention_modules, check_own_forward, own_forward_, refuse_norms_of_heads
from trimtab.stabilizers.registry import register
from trimtab.stabilizers.stabilizer import Stabilizer

_EPS = 1e-6


@register("qk-norm")
@dataclass(frozen=True)
class QKNorm(Stabilizer):
    """QK-norm: LayerNorm over the features of each head of queries and keys (Dehghani et al., arXiv 2302.05442).

    "Scaling Vision Transformers to 22 Billion Parameters", section 2: ``softmax(LN(X W_q) LN(X W_k)^T / sqrt(d))``. A
    logit is then at most sqrt(d) times the product of the learned scales, whatever the size of W_q and W_k. The norms
    come before rotary embeddings. One scale of shape (head_dim,) for the queries of a layer and one for its keys,
    shared by its heads: ``query_norm`` and ``key_norm`` of the layer that makes them. It changes the model's function,
    so it is for models that have yet to be trained.

    When not to use it: on a trained model; where keys are cached in a compressed form and made anew from it (latent
    attention), which needs the norm at every use; with qk-clip, which would shrink weights whose size no longer
    counts. The learned scales may still grow: weight decay on them, or `affine=False`, bounds the logits for good.

    Attributes:
        norm: "layer", LayerNorm without bias, or "rms", RMSNorm.
        affine: whether the norms have learned scales.
    """

    order = 40

    norm: Literal["layer", "rms"] = "layer"
    affine: bool = True

    def apply_(self, model: nn.Module) -> None:
        """Normalise queries and keys of every attention module, in place.

        Raises:
            ConversionError: no attention is found, it has such norms, or a forward that cannot be changed.
        """
        refuse_clipped(model, "which would shrink weights whose size counts no longer: use one of them")
        layers: dict[int, dict[str, HeadRows]] = {}
        for attention in attention_modules(model, "qk-norm"):
            refuse_norms_of_heads(attention, "leave qk-norm away")
            for role, rows in (("query", attention.query), ("key", attention.key)):
                layers.setdefault(id(rows.layer), {})[role] = rows
            if isinstance(attention.holder, nn.MultiheadAttention):
                check_own_forward(attention.holder, attention.name)
        for parts in layers.values():
            for role, rows in parts.items():
                setattr(rows.layer, f"{role}_norm", self._norm(rows))
            layer = next(iter(parts.values())).layer
            if isinstance(layer, nn.MultiheadAttention):
                own_forward_(layer)
            else:
                layer.register_forward_hook(_NormsOfHeads.of(parts))
        fastpath.switch_off_(model)

    def _norm(self, rows: HeadRows) -> nn.Module:
        weight: Tensor = getattr(rows.layer, rows.weight_name)
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "elementwise_affine": self.affine}
        if self.norm == "rms":
            return nn.RMSNorm(rows.head_dim, _EPS, **options)
        return nn.LayerNorm(rows.head_dim, _EPS, bias=False, **options)


class _Span(NamedTuple):
    """In every group of outputs, those from `start` up to `stop` are queries or keys: the `role`."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class _NormsOfHeads:
    """A forward hook: normalises the queries, or keys, or both, among the outputs of a layer.

    Attributes:
        head_dim: features of a head.
        groups: into how many equal groups the outputs are divided, see `HeadRows`.
        spans: where in a group the queries and keys lie, in this order.
    """

    head_dim: int
    groups: int
    spans: tuple[_Span, ...]

    def __call__(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return (..., rows) for (..., rows)."""
        grouped = output.unflatten(-1, (self.groups, -1))
        parts, end = [], 0
        for role, start, stop in self.spans:
            heads = grouped[..., start:stop].unflatten(-1, (-1, self.head_dim))
            normalized = layer._modules[f"{role}_norm"](heads)  # type: ignore[misc]
            parts += [grouped[..., end:start], normalized.flatten(-2).to(output.dtype)]
            end = stop
        parts = [part for part in (*parts, grouped[..., end:]) if part.shape[-1]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).flatten(-2)

    @classmethod
    def of(cls, parts: Mapping[str, HeadRows]) -> "_NormsOfHeads":
        """Make the hook of one layer."""
        spans = sorted(
            (_Span(role, rows.start, rows.stop) for role, rows in parts.items()), key=lambda span: span.start
        )
        some = next(iter(parts.values()))
        return cls(some.head_dim, some.groups, tuple(spans))
