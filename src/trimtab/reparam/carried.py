"""What a converted weight carries: gamma, and the singular vectors from which sigma is computed."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from trimtab.spectral import Leading, Sizes, block_sigma, leading


class Carried(NamedTuple):
    """One converted weight with what it carries; all tensors are the live ones.

    Attributes:
        weight: the trained Parameter.
        matrix: a view of the weight of shape (rows, columns).
        gamma: shape (blocks,).
        basis: right singular vectors, shape (blocks, vectors, columns), that of sigma first.
        v: left singular vectors, shape (rows,).
        sizes: rows of each block.
    """

    weight: Tensor
    matrix: Tensor
    gamma: Tensor
    basis: Tensor
    v: Tensor
    sizes: Sizes

    @property
    def u(self) -> Tensor:
        """The right singular vector of each sigma, shape (blocks, columns)."""
        return self.basis[:, 0]

    def sigma(self) -> Tensor:
        """Return v^T W u of each block, shape (blocks,)."""
        # Clones, because the vectors may move between this and a backward through it.
        return block_sigma(self.matrix, self.u.clone(), self.v.clone(), self.sizes)

    def replicated(self) -> "Carried":
        """Return the same with the vectors as replicas on the mesh of a sharded weight; otherwise itself."""
        if not is_sharded(self.weight):
            return self
        basis, v = (replica(tensor, self.weight) for tensor in (self.basis, self.v))
        return self._replace(basis=basis, v=v)


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, without loading torch's distributed tensors to find out."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor (every process must ask), and any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    device = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    pieces = tensor if tensor.device.type == device else tensor.to(device)  # offloaded: processes talk elsewhere
    return pieces.full_tensor()  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return this process's own copy of a replicated tensor."""
    own: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return own


def replica(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Return a tensor that is the same on all processes as a replica on the mesh of a sharded one."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(local(tensor), mesh, [Replicate()] * mesh.ndim, run_check=False)


def cut_like(target: Tensor, value: Tensor) -> Tensor:
    """Return a value that is the same on all processes cut as a tensor that may be sharded; nothing is sent."""
    if not is_sharded(target):
        return value
    return replica(value, target).redistribute(placements=target.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def write_(target: Tensor, value: Tensor) -> None:
    """Copy a value that is the same on all processes into a tensor, which may be sharded; nothing is sent."""
    target.copy_(cut_like(target, value.to(target.dtype)))


def memory_of(parameter: Tensor) -> int:
    """Return a number that is the same for two parameters exactly when they are one, or lie in the same memory."""
    if is_lazy(parameter) or parameter.is_meta or is_sharded(parameter) or parameter.numel() == 0:
        return id(parameter)
    return parameter.data_ptr()


def carried_names(weight_name: str) -> tuple[str, str, str]:
    """Return the names under which a module carries gamma, right and left vectors of one of its weights."""
    gamma, u, v = (weight_name.replace("weight", part) for part in ("gamma", "sigma_u", "sigma_v"))
    return gamma, u, v


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """View a weight as (rows, columns), rows being outputs; ``transposed`` weights are stored (in, out)."""
    return weight.t() if transposed else weight.flatten(1)


class Start(NamedTuple):
    """What a weight begins with: gamma (blocks,), basis (blocks, vectors, columns), v (rows,), rows of each block."""

    gamma: Tensor
    basis: Tensor
    v: Tensor
    sizes: Sizes


def exact_start(matrix: Tensor, sizes: Sizes, vectors: int) -> Start:
    """Return the exact singular vectors of each row block, and the gamma that leaves the function unchanged.

    Of a matrix on the meta device these are of the right shapes and on the meta device too. Of a sharded matrix they
    are whole, the same on every process; every process must ask.

    Args:
        matrix: shape (rows, columns).
        sizes: rows of each block.
        vectors: right vectors for each block; no more than its shorter side are made.

    Raises:
        ValueError: if the matrix is not floating, empty, zero or not finite; the message says which and what to do.
    """
    if not matrix.is_floating_point() or matrix.numel() == 0:
        raise ValueError(f"expected floating values, at least one, got {matrix.dtype} of shape {tuple(matrix.shape)}")
    count = min(vectors, matrix.shape[1], *sizes)
    if matrix.is_meta:
        like = matrix.new_empty(0, dtype=torch.promote_types(matrix.dtype, torch.float32))
        gamma, v = like.new_empty(len(sizes)), like.new_empty(matrix.shape[0])
        return Start(gamma, like.new_empty(len(sizes), count, matrix.shape[1]), v, sizes)
    found = [find(count, None) for find in _finders(matrix, sizes)]
    if any(not bool(each.sigma > 0) for each in found):
        raise ValueError(
            "it, or one of its row blocks, is zero, so it has no direction to normalise: initialise it, give it fewer "
            "blocks, or leave it out with filter_fn"
        )
    basis, v = torch.stack([each.basis for each in found]), torch.cat([each.v for each in found])
    if is_sharded(matrix):
        return Start(torch.stack([each.sigma for each in found]), basis, v, sizes)
    # Not the sigma of the decomposition but v^T W u as the forward computes it: their ratio is then exactly 1.
    return Start(block_sigma(matrix, basis[:, 0], v, sizes), basis, v, sizes)


def sigma_in_use(c: Carried) -> Tensor:
    """Return sigma of each row block, shape (blocks,), detached; of a sharded weight every process must ask."""
    if not is_sharded(c.weight):
        return c.sigma().detach()
    from trimtab.spectral.sharded import sharded_sigma

    return sharded_sigma(c.matrix, local(c.u).detach(), local(c.v).detach(), c.sizes)


def true_sigma(matrix: Tensor, sizes: Sizes, start: Tensor) -> Tensor:
    """Return the exact largest singular value of each row block, shape (blocks,); NaN where it is not finite.

    Args:
        matrix: shape (rows, columns); of a sharded one every process must ask.
        sizes: rows of each block.
        start: guesses of the right singular vectors, shape (blocks, columns).
    """
    sigmas = []
    for find, guess in zip(_finders(matrix, sizes), start, strict=True):
        try:
            sigmas.append(find(1, local(guess)).sigma)
        except ValueError:
            sigmas.append(guess.new_full((), torch.nan))
    return torch.stack(sigmas)


def _finders(matrix: Tensor, sizes: Sizes) -> list[Callable[[int, Tensor | None], Leading]]:
    """Return, for each row block, what finds its leading vectors: called with (how many, a guess or None)."""
    if not is_sharded(matrix):
        return [partial(leading, block) for block in matrix.split(sizes)]
    from trimtab.spectral.sharded import pieces, sharded_leading

    return [partial(sharded_leading, part) for part in pieces(matrix, sizes)]
