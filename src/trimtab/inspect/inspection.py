"""`inspect_checkpoint`: every number of a checkpoint, tensor by tensor."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from trimtab.errors import CheckpointError
from trimtab.inspect.checkpoint import open_checkpoint
from trimtab.inspect.converted import Converted, converted_weights
from trimtab.inspect.heads import find_heads
from trimtab.inspect.measures import measure, qk_share_of_all_heads, qk_shares, sums
from trimtab.inspect.names import Heads, Role, attention_of, is_cross, layer_of, role_of, split_of, stored_transposed
from trimtab.inspect.report import Attention, Embedding, Matrix, Report, Skipped, Vector
from trimtab.inspect.stored import Checkpoint, Entry
from trimtab.watch.signals.embeddings import token_embedding_variability

_FLOATS = {"float64", "float32", "float16", "bfloat16"}
_SMALL_FLOATS = {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"}
_ROLES: tuple[Role, ...] = get_args(Role)
_PARTS: dict[str, Role] = {"query": "query", "key": "key", "value": "value"}
_UNKNOWN_HEADS = "queries and keys differ in size, and the number of heads is not known: give it with --num-heads."
_SCALES = ("_scale", "_scale_inv", "_scales")


class Layout(NamedTuple):
    """How a model keeps its weights: its heads, if known, and the weights stored (inputs, outputs)."""

    heads: Heads | None
    transposed: frozenset[str]


@torch.no_grad()
def inspect_checkpoint(
    path: str | Path,
    *,
    key: str | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    top: int = 1,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure every weight of a checkpoint, without running any code in it.

    Tensors are read one at a time (a pair of them for the q/k energy), so memory stays within about three times the
    largest tensor in float32, however large the checkpoint; small ones take some ten MB.

    Args:
        path: a safetensors file, a file of `torch.save`, the index of shards of either, a folder that holds one of
            these, or a folder of `torch.distributed.checkpoint`.
        key: where the model's state dict is in a file that holds more, dotted; looked for by default.
        num_heads: attention heads; by default what a config.json (or a run.json of ours) beside the file says, or the
            arguments saved with the model.
        num_kv_heads: heads of keys and values where there are fewer of them (grouped queries).
        top: how many singular values count as the top for the q/k energy.
        on_tensor: called before each tensor is read, with its name, the bytes read so far and those in all.

    Raises:
        CheckpointError: there is no such file, it is damaged or of an unknown kind, it holds more than tensors and
            plain values, or it holds no weight matrix at all. Or a number of heads or `top` is below 1, or the kv heads
            do not divide the heads.
    """
    _check(num_heads, num_kv_heads, top)
    checkpoint = open_checkpoint(path, key)
    heads = find_heads(num_heads, num_kv_heads, Path(path), checkpoint.facts)
    roles = {name: role_of(name, entry.shape) for name, entry in checkpoint.entries.items()}
    names = sorted(roles, key=_in_order_of_layers(list(roles), roles))
    layout = Layout(heads, stored_transposed({name: entry.shape for name, entry in checkpoint.entries.items()}))
    converted = converted_weights(checkpoint, layout.transposed)
    carried = {name for weight in converted.values() for name in weight.names}
    size = sum(entry.size for entry in checkpoint.entries.values())

    matrices: list[Matrix] = []
    embeddings: list[Embedding] = []
    vectors: list[Vector] = []
    skipped: list[Skipped] = []
    tell = on_tensor or (lambda name, read, size: None)
    read = 0
    for name in names:
        entry = checkpoint.entries[name]
        reason = _unreadable(name, entry, checkpoint.entries)
        if name in carried:
            continue
        if reason:
            skipped.append(Skipped(name, entry.shape, entry.dtype, reason))
            continue
        tell(name, read, size)
        read += entry.size
        shape = tuple(length for length in entry.shape if length != 1)
        if len(shape) < 2:
            vectors.append(_vector(name, entry, checkpoint.load(name)))
            continue
        measured, tev = _measure(name, entry, checkpoint.load(name), layout, converted.get(name))
        matrices += measured
        embeddings += tev
    if not matrices:
        raise CheckpointError(_no_matrix(path, checkpoint, skipped, len(vectors)))
    attention, notes = _attention(matrices, checkpoint, layout, top, lambda what: tell(what, size, size))
    return Report(
        path=str(path),
        kind=checkpoint.kind,
        key=checkpoint.key,
        left_out=checkpoint.left_out,
        tensors=len(names),
        parameters=sum(math.prod(entry.shape) for name, entry in checkpoint.entries.items() if name not in carried),
        size=size,
        num_heads=heads.query if heads else 0,
        num_kv_heads=heads.key if heads else 0,
        top=top,
        matrices=tuple(matrices),
        attention=attention,
        embeddings=tuple(embeddings),
        vectors=tuple(vectors),
        skipped=tuple(skipped),
        notes=checkpoint.notes + notes,
    )


def _measure(
    name: str, entry: Entry, tensor: Tensor, layout: Layout, converted: Converted | None
) -> tuple[list[Matrix], list[Embedding]]:
    role = role_of(name, entry.shape)
    parts = _parts(name, role, tensor, layout)
    gamma: tuple[float, ...] = ()
    in_use: tuple[float, ...] = ()
    if converted is not None:
        gamma, in_use = converted.read(tensor, [len(part) for _, part in parts])
    matrices = []
    share = len(gamma) // len(parts) if len(gamma) % len(parts) == 0 else 0  # a part's own blocks, if they are even
    for number, (part, rows) in enumerate(parts):
        each = slice(number * share, (number + 1) * share) if share else slice(None)
        matrices.append(
            Matrix(
                name=name,
                part=part,
                role=_PARTS.get(part, role),
                cross=is_cross(name),
                shape=entry.shape,
                dtype=entry.dtype,
                **measure(rows)._asdict(),
                gamma=gamma[each],
                sigma_in_use=in_use[each],
            )
        )
    if role != "embedding":
        return matrices, []
    tev = token_embedding_variability(tensor.float() if tensor.element_size() == 1 else tensor)
    return matrices, [Embedding(name, entry.shape, tev.mean, tev.std)]


def _parts(name: str, role: Role, tensor: Tensor, layout: Layout) -> list[tuple[str, Tensor]]:
    """The matrices of one tensor: the parts of a fused one, the experts of a stack of them, or itself."""
    if tensor.ndim == 3 and "experts" in name:
        return [(f"expert {number}", expert) for number, expert in enumerate(tensor)]
    matrix = _as_matrix(tensor, name in layout.transposed)
    fused = role == "fused" and tensor.ndim == 2
    split = split_of(name, matrix.shape[0], matrix.shape[1], layout.heads) if fused else None
    if split is None:
        return [("", matrix)]
    sizes = [rows for _, rows in split.sizes]
    if split.by_head and layout.heads is not None:
        heads = layout.heads.query
        per_head = matrix.unflatten(0, (heads, -1)).split([rows // heads for rows in sizes], 1)
        pieces = [piece.flatten(0, 1) for piece in per_head]
    else:
        pieces = list(matrix.split(sizes))
    return [(part, piece) for (part, _), piece in zip(split.sizes, pieces, strict=True)]


def _as_matrix(tensor: Tensor, transposed: bool) -> Tensor:
    """A weight as (outputs, everything else); dimensions of one in front, as position embeddings have, are dropped."""
    while tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.element_size() == 1:
        tensor = tensor.float()
    return tensor.t() if transposed else tensor.flatten(1)


def _vector(name: str, entry: Entry, tensor: Tensor) -> Vector:
    if not tensor.numel():
        return Vector(name, entry.shape, entry.dtype, 0.0, 0.0, 0)
    square, max_abs, nonfinite = sums(tensor.float() if tensor.element_size() == 1 else tensor)
    return Vector(name, entry.shape, entry.dtype, (square / tensor.numel()) ** 0.5, max_abs, nonfinite)


def _attention(
    matrices: list[Matrix], checkpoint: Checkpoint, layout: Layout, top: int, tell: Callable[[str], None]
) -> tuple[tuple[Attention, ...], tuple[str, ...]]:
    """Pair queries with keys, module by module, and measure the energy of each pair; say which could not be."""
    found: dict[str, dict[str, str]] = {}
    for matrix in matrices:
        if matrix.role in ("query", "key") and len(matrix.shape) == 2:
            found.setdefault(attention_of(matrix.name), {})[matrix.role] = matrix.name
    pairs = {module: names for module, names in found.items() if {"query", "key"} <= names.keys()}
    measured = []
    for module, names in pairs.items():
        tell(f"q/k energy of {module}")
        measured.append(_energy(module, names, checkpoint, layout, top))
    known = tuple(each for each in measured if each is not None)
    notes = []
    if len(known) < len(measured):
        notes.append(
            f"The q/k energy of {len(measured) - len(known)} of {len(measured)} attention modules is left out: "
            + (f"{layout.heads.query} heads do not fit their rows." if layout.heads else _UNKNOWN_HEADS)
        )
    fused = sum(matrix.role == "fused" for matrix in matrices)
    if fused:
        notes.append(
            f"{fused} fused query-key-value weights are measured whole: which of their rows are queries cannot be told "
            "from the names and the number of heads."
        )
    factors = sum(matrix.role.endswith(" factor") for matrix in matrices)
    if factors:
        notes.append(
            f"{factors} factors of low-rank queries, keys and values are measured one by one, without q/k energy: "
            "merge them (fold_) for the numbers of their products."
        )
    return known, tuple(notes)


def _energy(
    module: str, names: Mapping[str, str], checkpoint: Checkpoint, layout: Layout, top: int
) -> Attention | None:
    query = _side("query", names["query"], checkpoint, layout).clone()  # a copy, so that its file is let go
    key = _side("key", names["key"], checkpoint, layout)
    if layout.heads is None:
        same = query.shape[0] == key.shape[0]
        return Attention(module, 0, (qk_share_of_all_heads(query, key, top),)) if same else None
    num_heads = layout.heads.query
    head_dim = query.shape[0] // num_heads
    key_heads = key.shape[0] // head_dim if head_dim else 0  # by their rows: models may change it from layer to layer
    fits = num_heads * head_dim == query.shape[0] and key_heads * head_dim == key.shape[0]
    if not fits or not key_heads or num_heads % key_heads:
        return None
    return Attention(module, num_heads, tuple(qk_shares(query, key, num_heads, key_heads, top)))


def _side(role: str, name: str, checkpoint: Checkpoint, layout: Layout) -> Tensor:
    tensor = checkpoint.load(name)
    parts = dict(_parts(name, role_of(name, checkpoint.entries[name].shape), tensor, layout))
    return parts.get(role, next(iter(parts.values())))


def _unreadable(name: str, entry: Entry, entries: Mapping[str, Entry]) -> str:
    if entry.unread:
        return entry.unread
    if not math.prod(entry.shape):
        return "empty"
    if entry.dtype in _SMALL_FLOATS and any(name + scale in entries for scale in _SCALES):
        return "8-bit with scales of its own, which are not applied here"
    packed = (name.removesuffix(scale) for scale in _SCALES if name.endswith(scale))
    if any(base in entries and entries[base].dtype not in _FLOATS for base in packed):
        return "scales of a packed weight"
    if entry.dtype not in _FLOATS | _SMALL_FLOATS:
        return f"{entry.dtype}: packed, or no weight"
    return ""


def _in_order_of_layers(names: list[str], roles: Mapping[str, Role]) -> Callable[[str], tuple[int, ...]]:
    """Sort key: embeddings, the layers by number, what follows them; in a layer q, k, v first; else as in the file."""
    place = {name: position for position, name in enumerate(names)}
    first: dict[str, int] = {}
    for name in names:
        first.setdefault(layer_of(name).stack, place[name])

    def key(name: str) -> tuple[int, ...]:
        layer = layer_of(name)
        if layer.stack:
            decodes = "decoder" in layer.stack  # files sorted by name have it before the encoder
            return 1, decodes, first[layer.stack], layer.number, is_cross(name), _ROLES.index(roles[name]), place[name]
        return 0 if roles[name] in ("embedding", "position", "patch") else 2, place[name]

    return key


def _check(num_heads: int | None, num_kv_heads: int | None, top: int) -> None:
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("top", top)):
        if value is not None and value < 1:
            raise CheckpointError(f"expected {name} of at least 1, got {value}")
    if num_kv_heads is not None and (num_heads is None or num_heads % num_kv_heads):
        raise CheckpointError(f"expected num_heads as a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")


def _no_matrix(path: str | Path, checkpoint: Checkpoint, skipped: list[Skipped], vectors: int) -> str:
    if not checkpoint.entries:
        return f"{path} holds no tensors{f' at {checkpoint.key}' if checkpoint.key else ''}"
    why = f", and {len(skipped)} that cannot be measured (the first: {skipped[0].reason})" if skipped else ""
    return f"{path} holds no weight matrix: {vectors} tensors of fewer than two dimensions{why}"
