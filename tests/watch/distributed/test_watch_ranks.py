"""A Watch on every process of a run: one log, the same alarms everywhere, weights as without it."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo_processes import in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trimtab.errors import RunFolderError
from trimtab.watch import Thresholds, Watch


class Net(nn.Module):
    """An embedding, attention of 2 heads and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.embedding(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def texts(rank: int) -> Tensor:
    return torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(rank))


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    if kind == "ddp":
        return DistributedDataParallel(net)
    fully_shard(net.qkv)
    return fully_shard(net)


def train(model: nn.Module, tokens: Tensor, watch: Watch | None = None) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if watch is not None:
            watch.step(loss)
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def everyones(mine: object) -> list:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def check(rank: int, kind: str, folder: str) -> None:
    path, tokens = Path(folder), texts(rank)
    unwatched = made(kind)
    train(unwatched, tokens)
    model = made(kind)
    with Watch(model, path, every=2, thresholds=Thresholds(max_logit=1e-6), on_alarm=lambda alarm: None) as watch:
        losses = train(model, tokens, watch)
    assert all(map(torch.equal, weights(model), weights(unwatched)))
    # one log, of what all processes saw
    assert len({json.dumps(each) for each in everyones([watch.last | {"time": 0}, str(watch.alarms)])}) == 1
    assert watch.alarms
    of_all = everyones(losses)
    lines = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    for line, step in zip(lines, (1, 2, 4), strict=True):
        assert line["step"] == step
        assert line["loss"] == pytest.approx(sum(loss[step - 1] for loss in of_all) / len(of_all))
    # entropy of a head is the mean over processes: the same net, seen by one process with all texts
    alone = Net()
    torch.manual_seed(0)
    alone.load_state_dict(Net().state_dict())
    with torch.no_grad():
        for parameter, value in zip(alone.parameters(), weights(made(kind)), strict=True):
            parameter.copy_(value)
    if rank == 0:
        from trimtab.watch import observe

        with observe(alone) as seen:
            alone(torch.cat([texts(each) for each in range(dist.get_world_size())]))
        expected = seen.heads["(root)"]
        assert lines[0]["entropy_mean"] == pytest.approx(expected.entropy.mean().item(), abs=1e-6)
        assert lines[0]["max_logit"] == pytest.approx(expected.max_logit.max().item(), abs=1e-6)
    sigma = lines[-1]["sigma"]["head.weight"]  # the name of the weight, not of the wrapper
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    head = dict(zip(names, weights(model), strict=True))["head.weight"]
    assert sigma == pytest.approx([torch.linalg.matrix_norm(head, 2).item()], rel=1e-3)
    assert lines[-1]["grad_norm"] > 0
    # a used folder is refused on every process, so that none waits for the others
    with pytest.raises(RunFolderError, match="already holds a run"), Watch(model, path):
        pass


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_log_of_two_processes(tmp_path, kind) -> None:
    in_processes(2, check, kind, str(tmp_path))
