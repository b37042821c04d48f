"""The largest singular value of many weights, followed from one logging step to the next."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.reparam.carried import is_sharded
from trimtab.spectral import Leading, exact_products, leading, thin_product
from trimtab.spectral.norms import norms

# A weight of fewer entries is copied beside others of its shape: one product for all of them then costs less than the
# launch of one for each.
_STACK_BELOW = {"cpu": 2**16}
_STACK_BELOW_ELSEWHERE = 2**20
# An iteration that moves no sigma by more than this share is the last of its reading.
_SETTLED = 3e-3
# Vectors nearer than this to the span of the others count as part of it.
_RIDGE = 1e-6
# Vectors that a matrix shortens so much more than the first come out as rounding.
_LOST = 1e-10

Products = Callable[[list[Tensor]], list[Tensor]]


class WeightReading(NamedTuple):
    """What was seen of the weights, by dotted parameter name.

    Attributes:
        sigma: largest singular value, a list of one; NaN when the weight holds NaN or inf.
        stable_rank: ``||W||_F² / sigma²``, from 1 to the rank; NaN of a zero weight.
    """

    sigma: dict[str, list[float]]
    stable_rank: dict[str, float]


class SigmaTracker:
    """Follows the largest singular value of many weights from one logging step to the next, for two reads of each.

    A weight is met with an exact decomposition (SVD or Lanczos). From then on each reading moves the block of right
    vectors kept for it by one power iteration, all small weights of one shape together, and takes the Rayleigh-Ritz
    value, which is never above the truth beyond rounding. How far below it falls depends on how far the weights
    turned since the last reading; docs/signals.md says what was measured.

    It does what `trimtab.spectral.block_iteration` does for converted weights, in about half the time for small ones,
    as it may wait for the device and keeps no left vectors.

    Args:
        iterations: most power iterations a reading. It ends before when the last one moved no sigma by more than .3 %,
            so that one serves while weights turn slowly.
        vectors: right vectors kept for each weight; more of them follow better and cost more.
    """

    def __init__(self, iterations: int = 4, vectors: int = 4) -> None:
        self._iterations, self._vectors = iterations, vectors
        self._bases: dict[_Stack, Tensor] = {}  # (weights, vectors, columns)
        self._last: dict[str, float] = {}  # sigmas read last
        self._loaded: dict[tuple[str, ...], Tensor] = {}  # bases by the names of their weights, until the next reading

    def state_dict(self) -> dict[str, Any]:
        """What the next reading starts from: plain values and tensors."""
        bases = {stack.names: basis for stack, basis in self._bases.items()} | self._loaded
        return {
            "last": dict(self._last),
            "bases": [{"names": list(names), "basis": basis} for names, basis in bases.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._bases, self._last = {}, dict(state["last"])
        self._loaded = {tuple(kept["names"]): kept["basis"].clone() for kept in state["bases"]}

    @torch.no_grad()
    def read(self, weights: Mapping[str, Tensor], *, exact: bool = False) -> WeightReading:
        """Measure weights such as `plain_weights` names; of sharded ones (DTensors) every process must ask.

        Args:
            weights: tensors of two or more dimensions by name, flattened to (out, everything else).
            exact: decompose anew instead of iterating.
        """
        matrices = {name: weight.detach().flatten(1) for name, weight in weights.items()}
        stacks = _stacks(matrices)
        self._bases = {stack: self._bases[stack] for stack in stacks if stack in self._bases}
        for stack in stacks:
            if stack.names in self._loaded:
                self._bases[stack] = self._loaded[stack.names].to(stack.device)
        self._loaded = {}
        followed = set() if exact else set(self._bases)
        sigmas: dict[str, float] = {}
        with ExitStack() as contexts:
            for device_type in {matrix.device.type for matrix in matrices.values()}:
                contexts.enter_context(exact_products(device_type))
            for sharded in (False, True):
                known = [stack for stack in stacks if stack in followed and stack.sharded == sharded]
                names = [name for stack in known for name in stack.names]
                sigmas |= zip(names, self._follow(known, matrices), strict=True)
            for stack in stacks:
                if stack not in followed:
                    sigmas |= self._decompose(stack, matrices)
        self._last, ranks = sigmas, {}
        for name, size in zip(matrices, norms(list(matrices.values())).tolist(), strict=True):
            ranks[name] = (size / sigmas[name]) ** 2 if sigmas[name] else math.nan
        return WeightReading({name: [sigmas[name]] for name in matrices}, ranks)

    def _follow(self, stacks: "list[_Stack]", matrices: Mapping[str, Tensor]) -> list[float]:
        """Sigma of the weights of each stack after the iterations of their bases."""
        if not stacks:
            return []
        to_rows, to_columns = _products([[matrices[name] for name in stack.names] for stack in stacks])
        bases = [self._bases[stack] for stack in stacks]
        last = [self._last.get(name, math.nan) for stack in stacks for name in stack.names]
        found = torch.tensor(last, dtype=torch.float64, device="cpu")
        for _ in range(self._iterations):
            before = found
            bases, found = iteration(bases, to_rows, to_columns)
            if not bool(((found - before).abs() > _SETTLED * found).any()):  # NaN is not waited for
                break
        self._bases |= zip(stacks, bases, strict=True)
        return found.tolist()

    def _decompose(self, stack: "_Stack", matrices: Mapping[str, Tensor]) -> dict[str, float]:
        """Exact sigma of the weights of one stack; their leading vectors become its basis unless one is not finite."""
        count, known = min(self._vectors, *stack.shape), self._bases.get(stack)
        sigmas, bases = {}, []
        for i, name in enumerate(stack.names):
            try:
                found = _leading(matrices[name], count, None if known is None else known[i, 0])
            except ValueError:  # NaN or inf
                sigmas[name] = math.nan
            else:
                sigmas[name] = found.sigma.item()
                bases.append(found.basis)
        if len(bases) == len(stack.names):
            self._bases[stack] = torch.stack(bases)
        return sigmas


class _Stack(NamedTuple):
    """Weights that are multiplied together: their names, and what they have in common."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    sharded: bool


def _stacks(matrices: Mapping[str, Tensor]) -> list[_Stack]:
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, matrix in matrices.items():
        small = matrix.numel() < _STACK_BELOW.get(matrix.device.type, _STACK_BELOW_ELSEWHERE)
        kind = (matrix.shape, matrix.dtype, matrix.device)
        groups.setdefault(kind if small and not is_sharded(matrix) else (name,), []).append(name)
    found = []
    for names in groups.values():
        first = matrices[names[0]]
        shape = (first.shape[0], first.shape[1])
        found.append(_Stack(tuple(names), shape, first.dtype, first.device, is_sharded(first)))
    return found


def _products(stacks: Sequence[list[Tensor]]) -> tuple[Products, Products]:
    """Products of vectors with the transposes of the matrices of each stack, and with the matrices."""
    if is_sharded(stacks[0][0]):  # then all are, and each is a stack of its own
        from trimtab.spectral.sharded import pieces, products_to_columns, products_to_rows

        parts = [pieces(matrix, (matrix.shape[0],))[0] for (matrix,) in stacks]
        return partial(products_to_rows, parts), partial(products_to_columns, parts)
    blocks = [torch.stack(stack) if len(stack) > 1 else stack[0].unsqueeze(0) for stack in stacks]
    return (
        lambda vectors: [thin_product(x, block.mT) for x, block in zip(vectors, blocks, strict=True)],
        lambda vectors: [thin_product(x, block) for x, block in zip(vectors, blocks, strict=True)],
    )


def _leading(matrix: Tensor, count: int, start: Tensor | None) -> Leading:
    if not is_sharded(matrix):
        return leading(matrix, count, start)
    from trimtab.spectral.sharded import pieces, sharded_leading

    return sharded_leading(pieces(matrix, (matrix.shape[0],))[0], count, start)


def iteration(bases: Sequence[Tensor], to_rows: Products, to_columns: Products) -> tuple[list[Tensor], Tensor]:
    """Move right vectors by one block power iteration, and measure sigma by Rayleigh-Ritz in the span of their images.

    With U the vectors as rows, P = U W^T and Y = P W. The largest ``|W^T v| / |v|`` over the span of P is the square
    root of the largest λ in ``Y Y^T c = λ P P^T c``: a lower bound of sigma whatever the vectors are, as each v is
    measured by its own length. The rows of ``C Y``, C being all the eigenvectors, are orthogonal: the new vectors
    (Parlett, The Symmetric Eigenvalue Problem, chapter 11).

    Args:
        bases: right vectors U, shape (B, k, columns), for each stack of B matrices.
        to_rows: ``U W^T`` for each, shape (B, k, rows).
        to_columns: ``P W`` for each, shape (B, k, columns).

    Returns:
        The new vectors, those of the largest singular value first, and sigma of all matrices, float64 on the CPU; NaN
        for a matrix that is not finite, whose vectors stay as they were.
    """
    # With entries of order one, so that no square overflows or vanishes.
    images = [each / each.abs().amax(2, keepdim=True).clamp(min=_tiny(each)) for each in to_rows(list(bases))]
    returned = to_columns(images)
    sigmas: list[Tensor] = [torch.empty(0)] * len(bases)
    moved = list(bases)
    for k in {basis.shape[1] for basis in bases}:
        members = [i for i, basis in enumerate(bases) if basis.shape[1] == k]
        counts = [len(bases[i]) for i in members]
        energy, length = (torch.cat([_gram(each[i]) for i in members]) for each in (returned, images))
        values, mixes = _eigen(energy, length)
        for i, value, mix in zip(members, values.split(counts), mixes.split(counts), strict=True):
            sigmas[i] = value
            new = torch.bmm(mix.to(returned[i]), returned[i])
            moved[i] = torch.where(new.isfinite().all(2, keepdim=True), new, bases[i])
    return moved, torch.cat(sigmas)


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny


def _gram(vectors: Tensor) -> Tensor:
    """Inner products of vectors (B, k, n): shape (B, k, k), float64, on the CPU."""
    if vectors.device.type != "mps":  # Apple's GPUs have no float64
        vectors = vectors.double()
    return torch.bmm(vectors, vectors.mT).cpu().double()


def _eigen(energy: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of the largest λ in ``E c = λ L c``, and ``c / sqrt(λ)`` of all λ as rows, the largest first.

    NaN where E or L is not finite, and rows of NaN where λ is lost in rounding. Shapes (B,) and (B, k, k).
    """
    finite = (energy + length).isfinite().all(-1).all(-1)
    usable, unit = finite[:, None, None], torch.eye(energy.shape[1], dtype=energy.dtype, device="cpu")
    length, energy = torch.where(usable, length, unit), torch.where(usable, energy, unit)
    # Where the images depend on each other, the ridge keeps what lies in their rounding from looking large.
    ridge = _RIDGE * length.diagonal(dim1=1, dim2=2).amax(1) + _tiny(length)
    factor = torch.linalg.cholesky(length + ridge[:, None, None] * unit)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
    values, vectors = torch.linalg.eigh(inverse @ energy @ inverse.mT)
    values, vectors = values.flip(1), (inverse.mT @ vectors).mT.flip(1)
    told = values > _LOST * values[:, :1]
    rows = torch.where((told & finite[:, None])[:, :, None], vectors * values.rsqrt()[:, :, None], torch.nan)
    return torch.where(finite, values[:, 0].clamp(min=0).sqrt(), torch.nan), rows
