"""What is found in a checkpoint: plain frozen records."""

from dataclasses import dataclass

from trimtab.inspect.names import Role


@dataclass(frozen=True)
class Matrix:
    """One weight matrix, or the part of a fused one that makes queries, keys or values, or one expert.

    Attributes:
        name: of the tensor in the checkpoint.
        part: "query", "key", "value", "expert 3"; "" for a whole tensor.
        role: what it does, as far as its name tells; "other" if it does not.
        cross: whether it is of attention to another sequence.
        shape: of the tensor as stored.
        dtype: as stored.
        sigma: largest singular value; convolutions are flattened to (out, everything else). NaN if not finite.
        stable_rank: squared Frobenius norm over squared sigma; NaN if it is zero or not finite.
        frobenius: square root of the sum of squares.
        rms: root mean square of the entries.
        max_abs: largest magnitude among the finite entries.
        nonfinite: entries that are NaN or infinite.
        gamma: of a weight under sigma-Reparam, for each of its blocks; () for a plain one.
        sigma_in_use: v^T W u of the vectors such a weight carries, for each of its blocks; gamma over it is the factor
            that the forward applies.
    """

    name: str
    part: str
    role: Role
    cross: bool
    shape: tuple[int, ...]
    dtype: str
    sigma: float
    stable_rank: float
    frobenius: float
    rms: float
    max_abs: float
    nonfinite: int
    gamma: tuple[float, ...] = ()
    sigma_in_use: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """Name and part."""
        return f"{self.name} [{self.part}]" if self.part else self.name


@dataclass(frozen=True)
class Attention:
    """The pair of query and key weights of one attention module.

    Attributes:
        name: of the module.
        num_heads: heads, or 0 where their number is unknown and all are taken as one.
        energy: share of the energy of W_q^T W_k in its top singular values, a number for each head.
    """

    name: str
    num_heads: int
    energy: tuple[float, ...]


@dataclass(frozen=True)
class Embedding:
    """A token embedding: its variability (TEV), mean and standard deviation over the vocabulary."""

    name: str
    shape: tuple[int, ...]
    tev_mean: float
    tev_std: float


@dataclass(frozen=True)
class Vector:
    """A tensor of one dimension (a bias, a gain), or of none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rms: float
    max_abs: float
    nonfinite: int


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not measured, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass(frozen=True)
class Report:
    """All of one checkpoint.

    Attributes:
        path: what was inspected.
        kind: its format, in words.
        key: the part of it that was taken for the model; "" for all.
        left_out: the names beside that part.
        tensors: how many there are, the vectors of sigma-Reparam included.
        parameters: how many numbers they hold.
        size: bytes.
        num_heads: of the queries; 0 if unknown.
        num_kv_heads: of keys and values; 0 if unknown.
        top: how many singular values count as the top in `attention`.
        matrices: in the order of the checkpoint, layers in the order of their numbers.
        attention: q/k pairs.
        embeddings: token embeddings.
        vectors: the rest.
        skipped: what was not measured.
        notes: what else the reader should know.
    """

    path: str
    kind: str
    key: str
    left_out: tuple[str, ...]
    tensors: int
    parameters: int
    size: int
    num_heads: int
    num_kv_heads: int
    top: int
    matrices: tuple[Matrix, ...]
    attention: tuple[Attention, ...]
    embeddings: tuple[Embedding, ...]
    vectors: tuple[Vector, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """The names of the tensors that hold NaN or infinities."""
        tensors: tuple[Matrix | Vector, ...] = (*self.matrices, *self.vectors)
        return tuple(dict.fromkeys(each.name for each in tensors if each.nonfinite))
