"""Compiled models and optimisers, and captured CUDA graphs: no recompilation, vectors move, all as in eager mode."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class Net(nn.Module):
    """Images and tokens in; one layer of every kind, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, stride=2)
        self.embed = nn.Embedding(10, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        x = torch.cat([self.patch(image).flatten(2).transpose(1, 2), self.embed(tokens)], 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + torch.tanh(self.hidden(x))).mean(1))


def net(vectors: int, blocks: Any, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    model = Net().to(device, dtype)
    return tt.reparametrize_(model, tt.SigmaReparam("one", vectors=vectors, blocks=blocks, embeddings=True))


def batch(seed: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(4, 3, 4, 4, generator=generator, dtype=dtype)
    return image.to(device), torch.randint(0, 10, (4, 5), generator=generator).to(device)


def loss_of(forward: Callable[..., Tensor], image: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(forward(image, tokens), tokens[:, 0])


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def carried(model: nn.Module) -> dict[str, Tensor]:
    sigmas = {f"sigma of {name}": sigma for name, (sigma, _) in sigma_gamma(model).items()}
    return sigmas | {name: buffer.clone() for name, buffer in model.named_buffers()}


def train(
    model: Net,
    forward: Callable[..., Tensor],
    steps: int,
    step: Callable[[], Any] | None = None,
    data: Callable[[int], tuple[Tensor, Tensor]] = batch,
) -> list[float]:
    """Train, see to it that every u, v and sigma moves at every step, and return the losses."""
    optimizer = None if step else adamw(model)
    losses = []
    for i in range(steps):
        before = carried(model)
        loss = loss_of(forward, *data(i))
        losses.append(float(loss.detach()))
        model.zero_grad()
        loss.backward()
        (step or optimizer.step)()
        for name, tensor in carried(model).items():
            assert not torch.equal(tensor, before[name]), name
    return losses


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("vectors", "blocks"), [(1, "auto"), (4, "auto"), (4, "heads")])
def test_fifty_steps_of_a_compiled_model(vectors: int, blocks: str) -> None:
    model, eager = net(vectors, blocks), net(vectors, blocks)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), 50)
    expected = train(eager, eager, 50)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-7, atol=1e-9)


@needs_compiler
def test_inductor() -> None:
    model, eager = net(4, "heads"), net(4, "heads")
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(model, torch.compile(model, fullgraph=True), 4)
    assert losses == pytest.approx(train(eager, eager, 4), rel=1e-9)


def test_uneven_blocks_and_a_forward_without_gradients() -> None:
    model, eager = (net(4, lambda module, name: (7, 4, 5) if name == "hidden" else None) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert train(model, compiled, 3) == pytest.approx(train(eager, eager, 3), rel=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*batch(0)), eager(*batch(0)))


@pytest.mark.parametrize("how", ["step", "function"])
def test_a_compiled_optimiser_step_moves_the_vectors_outside_its_graph(how: str) -> None:
    model, eager = net(4, "auto"), net(4, "auto")
    optimizer = adamw(model)
    step = torch.compile(optimizer.step if how == "step" else lambda: optimizer.step(), backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    losses = train(model, model, 5, step)
    # torch compiles its update with another order of rounding
    assert losses == pytest.approx(train(eager, eager, 5), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the update; nothing of ours is traced


def test_a_whole_training_step_compiled_in_pieces() -> None:
    model, eager = net(4, "auto"), net(4, "auto")
    optimizer = adamw(model)

    @torch.compile(backend="aot_eager")
    def training_step(image: Tensor, tokens: Tensor) -> Tensor:
        loss = loss_of(model, image, tokens)
        value = loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    losses = []
    for i in range(4):
        before = carried(model)
        losses.append(float(training_step(*batch(i))))
        for name, tensor in carried(model).items():
            assert not torch.equal(tensor, before[name]), name
    assert losses == pytest.approx(train(eager, eager, 4), rel=1e-5)


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*AccumulateGrad.*stream:UserWarning")  # of the warm-up, which torch asks for
def test_a_whole_training_step_as_a_cuda_graph() -> None:
    """Forward, backward, the optimiser's step and with it the refresh: captured once, replayed ten times."""
    model, eager = net(4, "heads", "cuda"), net(4, "heads", "cuda")
    optimizer, eager_optimizer = adamw(model, capturable=True), adamw(eager, capturable=True)
    inputs = batch(0, "cuda")

    def training_step(own: Net, own_optimizer: torch.optim.Optimizer, image: Tensor, tokens: Tensor) -> Tensor:
        own_optimizer.zero_grad(set_to_none=True)
        loss = loss_of(own, image, tokens)
        loss.backward()
        own_optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training_step(model, optimizer, *inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step(model, optimizer, *inputs)
    for _ in range(3):
        training_step(eager, eager_optimizer, *inputs)
    for i in range(10):
        for static, new in zip(inputs, batch(i, "cuda"), strict=True):
            static.copy_(new)
        before = carried(model)
        graph.replay()
        expected = training_step(eager, eager_optimizer, *inputs)
        torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)
        for name, tensor in carried(model).items():
            assert not torch.equal(tensor, before[name]), name
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-8)


@needs_gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_the_gpu(mode: str) -> None:
    model, eager = (net(4, "heads", "cuda", torch.float32) for _ in range(2))

    def data(seed: int) -> tuple[Tensor, Tensor]:
        return batch(seed, "cuda", torch.float32)

    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(model, torch.compile(model, fullgraph=True, mode=mode), 10, data=data)
    assert losses == pytest.approx(train(eager, eager, 10, data=data), rel=1e-4)
