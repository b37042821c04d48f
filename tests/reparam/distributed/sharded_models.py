"""What the tests of this folder train, in one process and in several."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import trimtab as tt
from trimtab.reparam import sigma_gamma

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Rows that processes share unevenly, across blocks too; a convolution; a two-layer MLP to split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 9, 2)
        self.embed = nn.Linear(9, 10)
        self.attention = nn.MultiheadAttention(10, 2, bias=False, batch_first=True)
        self.up, self.down = nn.Linear(10, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, L) to (B, L - 1, 5)."""
        x = self.embed(self.conv(x).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.down(torch.tanh(self.up(x)))


def net(dtype: torch.dtype = torch.float64, config: tt.SigmaReparam | None = None) -> Net:
    """Return the same converted network every time."""
    return tt.reparametrize_(plain_net(dtype), config)


def plain_net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


class Tied(nn.Module):
    """A head that is its embedding; 13 words, which processes share unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(13, 6), nn.Linear(6, 6), nn.Linear(6, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        """Map (B, L) to (B, L, 13)."""
        return self.head(torch.tanh(self.middle(self.embedding(words))))


def tied_net() -> Tied:
    torch.manual_seed(0)
    return tt.reparametrize_(Tied().double(), tt.SigmaReparam("one", embeddings=True))


def words() -> Batch:
    indices = torch.randint(13, (8, 5), generator=torch.Generator().manual_seed(2))
    return indices, nn.functional.one_hot(indices.roll(1, 1), 13).double()


def data(dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(8, 5, 5, generator=generator, dtype=torch.float64).to(dtype)


def share(batch: Batch, rank: int | None = None, count: int | None = None) -> Batch:
    """Return what one process gets of a batch, by default this one."""
    rank = dist.get_rank() if rank is None else rank
    count = dist.get_world_size() if count is None else count
    x, y = batch
    return x.chunk(count)[rank], y.chunk(count)[rank]


def all_processes() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard_(model: Net, mesh: DeviceMesh | None = None, **options: object) -> Net:
    """Shard as people do: some modules in groups of their own, the rest with the root."""
    mesh = all_processes() if mesh is None else mesh
    for part in (model.attention, model.up, model.down, model):
        fully_shard(part, mesh=mesh, **options)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None = None, steps: int = 20) -> None:
    optimizer = adamw(model) if optimizer is None else optimizer
    x, y = batch
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    """Compare weights, gammas, vectors and sigmas: to 1e-9 in float64, to 1e-5 in float32."""
    theirs = reference.state_dict()
    assert list(model.state_dict()) == list(theirs)
    for name, ours in model.state_dict().items():
        assert_close(whole(ours), theirs[name], name)
    assert_same_sigmas(model, reference)


def assert_same_sigmas(model: nn.Module, reference: nn.Module) -> None:
    expected = sigma_gamma(reference)
    found = sigma_gamma(model)
    assert list(found) == list(expected)
    for name, (sigma, gamma) in found.items():
        assert_close(sigma, expected[name][0], f"sigma of {name}")
        assert_close(gamma, expected[name][1], f"gamma of {name}")


def assert_close(ours: Tensor, theirs: Tensor, name: str) -> None:
    tolerance = 1e-9 if theirs.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


def message_of(call: Callable[[], object]) -> str:
    """Return what the ConversionError of a call says; no error, or another one, fails."""
    try:
        call()
    except tt.ConversionError as error:
        return str(error)
    raise AssertionError("expected a ConversionError")


def assert_equal_everywhere(text: str) -> None:
    """Fail unless all processes bring the same text; one that is not there makes the others time out."""
    everyone: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, text)
    assert everyone == [text] * len(everyone)
