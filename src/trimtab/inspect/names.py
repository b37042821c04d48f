"""What the names in a checkpoint say: which layer a tensor belongs to, what it does there, which rows are q, k and v.

Only names, shapes and the number of heads are known here, no module. The tables are those by which models are
converted (trimtab.reparam.blocks), and the common names of the other layers of a Transformer.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from trimtab.reparam.blocks import FUSED, KEY_VALUE, SEPARATE

Role = Literal[
    "query",
    "key",
    "value",
    "query factor",
    "key factor",
    "value factor",
    "fused",
    "output",
    "mlp in",
    "mlp gate",
    "mlp out",
    "embedding",
    "position",
    "patch",
    "head",
    "other",
]

_QUERY_KEY_VALUE = "query_key_value"  # found in both orders: one after the other, or head by head
# Models that go head by head, q | k | v in each; and those with an order of their own.
_HEAD_BY_HEAD_MODELS = {"bloom", "falcon", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "persimmon"}
_OTHER_ORDERS = {"codegen", "minimax"}

_EMBEDDINGS = {"wte", "embed_tokens", "word_embeddings", "tok_embeddings", "token_embedding", "token_embeddings"}
_EMBEDDINGS |= {
    "source_embedding",
    "target_embedding",
    "tokens_embed",
    "word_embedding",
    "tok_emb",
    "token_emb",
    "embed_in",
    "shared",
    "embedding",
    "embed",
    "embeddings",
}
_POSITIONS = {"wpe", "position_embeddings", "position_embedding", "positional_embedding", "pos_embed", "pos_emb"}
_POSITIONS |= {
    "embed_positions",
    "positions_embed",
    "position",
    "pos_embedding",
    "relative_attention_bias",
    "relative_position_bias_table",
}
_HEADS = {"lm_head", "head", "classifier", "score", "embed_out", "fc", "qa_outputs", "predictions.decoder"}
_GATE = {"gate_proj", "gate_up_proj", "w1", "wi_0", "w12"}
_IN = {"up_proj", "fc1", "c_fc", "wi", "wi_1", "w3", "linear1", "lin1", "fc_in", "dense_h_to_4h", "intermediate.dense"}
_OUT = {"down_proj", "fc2", "w2", "wo", "linear2", "lin2", "fc_out", "dense_4h_to_h", "output.dense", "c_proj"}
_OUTPUT = {"o_proj", "out_proj", "c_proj", "proj", "dense", "output.dense", "o", "wo", "out", "to_out", "out_lin"}
_OUTPUT |= {"to_out.0", "proj_out", "linear_out", "output", "0"}
_FACTORS = {"down", "up"}  # of a LowRankLinear
_CONV1D = ("c_attn.weight", "q_attn.weight", "c_proj.weight", "c_fc.weight")
_ATTENTION = re.compile(r"(^|[._])(self_?|cross_?|enc_?dec_?|multihead_?|mixed_?)?(attn|attention|mha)\d?([._]|$)")
_CROSS = re.compile(r"cross|encdec|enc_dec|encoder_attn|decoder.*multihead_attn")
_MLP = re.compile(r"(^|[._])(mlp|ffn?|feed_?forward|densereludense|experts?|intermediate)([._]|$)")


class Layer(NamedTuple):
    """The place of a tensor.

    Attributes:
        stack: the name of the list of layers, "transformer.h"; "" outside of any.
        number: of the layer in it, -1 outside.
        layer: "transformer.h.3"; "" outside.
        rest: the name within the layer, or the whole name outside.
    """

    stack: str
    number: int
    layer: str
    rest: str


def layer_of(name: str) -> Layer:
    """Find the layer: all up to the first number, or to the second one in models of stages of blocks."""
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    if not numbers or numbers[0] == len(words) - 1:
        return Layer("", -1, "", name)
    at = numbers[0]
    if len(words) > at + 3 and words[at + 1] in ("blocks", "layers") and words[at + 2].isdigit():
        at += 2
    stack = ".".join(words[:at]) or "layers"
    return Layer(stack, int(words[at]), ".".join(words[: at + 1]), ".".join(words[at + 1 :]))


def attention_of(name: str) -> str:
    """The attention module that a query or key weight belongs to: q_proj.weight lies one deeper than in_proj_weight."""
    return name.removesuffix(".weight").rpartition(".")[0]


def role_of(name: str, shape: Sequence[int]) -> Role:
    """Say what a weight does, by the end of its name, and by its shape where the name leaves two answers.

    Args:
        name: dotted name of the parameter.
        shape: of the parameter as stored.
    """
    module, _, own = name.rpartition(".")
    if own not in ("weight", "kernel"):  # in_proj_weight, q_proj_weight; or a bare parameter such as pos_embed
        module, own = name.removesuffix("_weight"), ""
    words = module.split(".")
    last, two = words[-1].lower(), ".".join(words[-2:]).lower()
    if last in _POSITIONS or two in _POSITIONS:
        return "position"
    if last in _EMBEDDINGS:
        return "embedding" if len(shape) == 2 else "patch"
    if "patch_embed" in module.lower() or "patch_embedding" in module.lower() or last == "patches":
        return "patch"
    inside = ".".join(words[:-1]).lower()
    attention = bool(_ATTENTION.search(inside))
    if attention or not _MLP.search(inside):
        for role, spelled in (("query", SEPARATE["query"]), ("key", SEPARATE["key"]), ("value", SEPARATE["value"])):
            if last in spelled:
                return role  # type: ignore[return-value]
            if last in _FACTORS and words[-2:][0].lower() in spelled:
                return f"{role} factor"  # type: ignore[return-value]
    if words[-1] in FUSED | KEY_VALUE | {_QUERY_KEY_VALUE} or (last == "in_proj" and not own):
        return "fused"
    if attention:
        return "output" if last in _OUTPUT or two in _OUTPUT else "other"
    for role, names in (("mlp gate", _GATE), ("mlp in", _IN), ("mlp out", _OUT), ("head", _HEADS)):
        if last in names or two in names:
            return role  # type: ignore[return-value]
    if _MLP.search(inside) and len(shape) == 2 and last not in ("gate", "router"):
        return "mlp in" if shape[0] >= shape[1] else "mlp out"
    return "other"


def is_cross(name: str) -> bool:
    """Say whether a name speaks of attention to another sequence."""
    return bool(_CROSS.search(name.lower()))


def stored_transposed(shapes: Mapping[str, Sequence[int]]) -> frozenset[str]:
    """The weights that are stored (inputs, outputs), as GPT-2's Conv1D does; its fused c_attn gives the model away."""
    shown = (s for name, s in shapes.items() if name.endswith("c_attn.weight") and len(s) == 2)
    if not any(s[1] == 3 * s[0] for s in shown):
        return frozenset()
    return frozenset(n for n, s in shapes.items() if n.endswith(_CONV1D) and len(s) == 2)


class Heads(NamedTuple):
    """How many query heads and key-value heads a model has, and what kind of model it is if that is known."""

    query: int
    key: int
    model_type: str = ""


class Split(NamedTuple):
    """How the rows of a fused weight divide.

    Attributes:
        sizes: rows of each part, ("query", 768) and so on.
        by_head: whether the rows go head by head (q1 k1 v1 q2 k2 v2 ...) instead of one part after the other.
    """

    sizes: tuple[tuple[Role, int], ...]
    by_head: bool = False


def split_of(name: str, rows: int, columns: int, heads: Heads | None) -> Split | None:
    """Divide the rows of a fused weight into query, key and value; None where that cannot be told.

    Args:
        name: of the parameter.
        rows: outputs of the weight.
        columns: inputs of the weight.
        heads: of the model, if known.
    """
    last = name.removesuffix("_weight").removesuffix(".weight").rpartition(".")[2]
    by_head = False
    if heads is None or not heads.model_type:
        if last == _QUERY_KEY_VALUE:
            return None
    elif heads.key > 1 and (last == _QUERY_KEY_VALUE or heads.model_type in _HEAD_BY_HEAD_MODELS | _OTHER_ORDERS):
        # With one head of keys both orders are the same.
        if heads.model_type not in _HEAD_BY_HEAD_MODELS or heads.key < heads.query:
            return None
        by_head = True
    if last in KEY_VALUE or (rows == 2 * columns and is_cross(name)):
        return Split((("key", rows // 2), ("value", rows // 2))) if rows % 2 == 0 else None
    if rows == 3 * columns and not (heads and heads.key < heads.query):
        return Split((("query", columns), ("key", columns), ("value", columns)), by_head)
    total = heads.query + 2 * heads.key if heads else 0
    if heads and total and rows % total == 0:
        size = rows // total
        return Split((("query", heads.query * size), ("key", heads.key * size), ("value", heads.key * size)), by_head)
    return None
