"""What a converted weight carries: gamma, and the singular vectors from which sigma is computed."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from trimtab.spectral import Sizes, block_sigma, spectral_norm


class Carried(NamedTuple):
    """One converted weight with what it carries; all tensors are the live ones.

    Attributes:
        weight: the trained Parameter.
        matrix: a view of the weight of shape (rows, columns).
        gamma: shape (blocks,).
        u: right singular vectors, shape (blocks, columns).
        v: left singular vectors, shape (rows,).
        sizes: rows of each block.
    """

    weight: Tensor
    matrix: Tensor
    gamma: Tensor
    u: Tensor
    v: Tensor
    sizes: Sizes

    def sigma(self) -> Tensor:
        """Return v^T W u of each block, shape (blocks,)."""
        return block_sigma(self.matrix, self.u, self.v, self.sizes)

    def replicated(self) -> "Carried":
        """Return the same with the vectors as replicas on the mesh of a sharded weight; otherwise itself."""
        if not is_sharded(self.weight) or is_sharded(self.u):
            return self
        from torch.distributed.tensor import DTensor, Replicate

        mesh = self.weight.device_mesh  # type: ignore[attr-defined]
        u, v = (DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False) for t in (self.u, self.v))
        return self._replace(u=u, v=v)


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, without loading torch's distributed tensors to find out."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor (every process must ask), and any other tensor as it is."""
    everything: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return everything


def memory_of(parameter: Tensor) -> int:
    """Return a number that is the same for two parameters exactly when they are one, or lie in the same memory."""
    if is_lazy(parameter) or parameter.is_meta or is_sharded(parameter) or parameter.numel() == 0:
        return id(parameter)
    return parameter.data_ptr()


def carried_names(weight_name: str) -> tuple[str, str, str]:
    """Return the names under which a module carries gamma, u and v of one of its weights."""
    gamma, u, v = (weight_name.replace("weight", part) for part in ("gamma", "sigma_u", "sigma_v"))
    return gamma, u, v


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """View a weight as (rows, columns), rows being outputs; ``transposed`` weights are stored (in, out)."""
    return weight.t() if transposed else weight.flatten(1)


class Start(NamedTuple):
    """What a weight is converted with: gamma (blocks,), u (blocks, columns), v (rows,), rows of each block."""

    gamma: Tensor
    u: Tensor
    v: Tensor
    sizes: Sizes


def exact_start(matrix: Tensor, sizes: Sizes) -> Start:
    """Return the exact singular vectors of each row block, and the gamma that leaves the function unchanged.

    Raises:
        ValueError: if the matrix is sharded or on the meta device, not floating, empty, zero or not finite; the
            message says which and what to do.
    """
    if is_sharded(matrix):
        raise ValueError("it is sharded already: convert (or load) first, then shard")
    if matrix.is_meta:
        raise ValueError("it is on the meta device: give it values first, then convert")
    if not matrix.is_floating_point() or matrix.numel() == 0:
        raise ValueError(f"expected floating values, got {matrix.dtype} of shape {tuple(matrix.shape)}")
    triplets = [spectral_norm(block) for block in matrix.split(sizes)]
    if any(not bool(sigma > 0) for sigma, _, _ in triplets):
        raise ValueError(
            "it is zero, so it has no direction to normalise: initialise it, or leave it out with filter_fn"
        )
    u = torch.stack([u for _, u, _ in triplets])
    v = torch.cat([v for _, _, v in triplets])
    # Not the sigma of the decomposition but v^T W u as the forward computes it: their ratio is then exactly 1.
    return Start(block_sigma(matrix, u, v, sizes), u, v, sizes)
