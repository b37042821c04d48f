"""Where stabilizers act in a model: its attention modules, and the layer that makes its logits."""

import re

from torch import nn

from trimtab.errors import ConversionError
from trimtab.reparam.blocks import is_linear
from trimtab.reparam.classes import carry_, mixin_of, plain_class_of
from trimtab.reparam.config import SigmaReparam
from trimtab.reparam.heads import Projections, projections
from trimtab.reparam.multihead import MultiheadAttention

# Children of attention modules that normalise queries or keys: q_norm, k_layernorm, norm_q, query_norm, qk_norm ...
_NORM_OF_HEADS = re.compile(
    r"(q|k|qk|query|key)_?(norm|ln|layer_?norm|rms_?norm)|(norm|ln|layer_?norm)_?(q|k|qk|query|key)"
)
_NAMES_OF_HEADS = ("head", "lm_head", "classifier", "score", "fc")
# Attributes by which attention modules, models and their configs tell a soft cap; the first is that of `softcap`.
_CAPS = ("attention_softcap", "softcap", "attn_logit_softcapping", "attn_logit_softcap", "logit_cap")


def attention_modules(model: nn.Module, stabilizer: str) -> list[Projections]:
    """Return the attention modules of a model whose layers for queries and keys are known.

    Raises:
        ConversionError: there is none, or one makes its queries and keys with the same rows.
    """
    found = list(projections(model))
    if not found:
        raise ConversionError(
            f"{stabilizer} finds no attention in this {type(model).__name__}: expected nn.MultiheadAttention, or "
            "modules that hold their query and key projections under the usual names (query, q_proj, qkv, c_attn "
            "...) and tell num_heads or head_dim"
        )
    for name, _, query, key in found:
        if query.layer is key.layer and (query.weight_name, query.start) == (key.weight_name, key.start):
            raise ConversionError(
                f"{name or 'the model'} makes its queries and keys with one weight, and {stabilizer} needs one for each"
            )
    return found


def refuse_norms_of_heads(attention: Projections, because: str) -> None:
    """Raise a ConversionError if a module's queries or keys are normalised before they meet."""
    holders = (attention.holder, attention.query.layer, attention.key.layer)
    named = (pair for holder in holders for pair in holder.named_children())
    norm = next((name for name, child in named if _NORM_OF_HEADS.fullmatch(name) and not _is_identity(child)), None)
    if norm is not None:
        raise ConversionError(f"{attention.name or 'the model'} has QK-norm already ({norm}): {because}")


def refuse_soft_cap(owner: nn.Module, name: str, because: str, attributes: tuple[str, ...] = _CAPS) -> None:
    """Raise a ConversionError if a module or its config tells of a soft cap.

    Args:
        owner: an attention module, or the model.
        name: what to call it.
        because: what to do instead.
        attributes: by which a cap is told.
    """
    for place in (owner, getattr(owner, "config", None)):
        cap = next((each for each in attributes if getattr(place, each, None)), None)
        if cap is not None:
            raise ConversionError(f"{name or 'the model'} has a soft cap already ({cap}): {because}")


def _is_identity(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def check_own_forward(attention: nn.MultiheadAttention, name: str) -> None:
    """Raise a ConversionError if an nn.MultiheadAttention cannot be given the forward of `own_forward_`."""
    if mixin_of(plain_class_of(attention)) is not MultiheadAttention or "forward" in attention.__dict__:
        raise ConversionError(
            f"{name or 'the model'} ({type(attention).__name__}) has a forward of its own, in which queries and keys "
            "cannot be reached: use nn.MultiheadAttention itself"
        )


def own_forward_(attention: nn.Module) -> None:
    """Give an nn.MultiheadAttention the forward of our own, which knows norms of heads and soft caps."""
    if not isinstance(attention, MultiheadAttention):
        carry_(attention, {}, SigmaReparam())


def output_head(model: nn.Module, name: str | None, stabilizer: str) -> nn.Module:
    """Return the linear layer whose outputs are the logits of a model.

    Args:
        model: any model.
        name: its dotted name, if told; else it is Hugging Face's ``get_output_embeddings()``, or the linear layer that
            the model itself holds under a usual name.
        stabilizer: who asks.

    Raises:
        ConversionError: there is none.
    """
    if name is not None:
        layer = dict(model.named_modules()).get(name)
        if layer is None:
            raise ConversionError(f"{stabilizer}: the model has no module {name!r}, which head= names")
        return layer
    told = getattr(model, "get_output_embeddings", None)
    candidates = [told() if callable(told) else None, *(getattr(model, each, None) for each in _NAMES_OF_HEADS)]
    found = next((each for each in candidates if isinstance(each, nn.Module) and is_linear(each)), None)
    if found is None:
        raise ConversionError(
            f"{stabilizer} does not find the layer that makes the logits of this {type(model).__name__}: "
            f"name it, as in {stabilizer}:head=decoder.out"
        )
    return found


def refuse_hook(module: nn.Module, kind: type, what: str) -> None:
    """Raise a ConversionError if a module has a forward hook of a kind already."""
    if any(isinstance(hook, kind) for hook in module._forward_hooks.values()):
        raise ConversionError(f"the layer that makes the logits ({type(module).__name__}) has {what} already")
