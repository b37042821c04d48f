"""fully_shard with parameters cast to bfloat16 for the forward, and models that are bfloat16 throughout."""

import pytest
import torch
import torch.distributed as dist
from gloo_processes import in_processes
from sharded_models import (
    adamw,
    assert_equal_everywhere,
    assert_same,
    data,
    net,
    shard_,
    share,
    train,
    whole,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import trimtab as tt

STEPS = 10
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def train_with_the_same_casts(model: nn.Module, count: int) -> None:
    """Do in one process what ``count`` do under POLICY: forward in bfloat16, masters and sums in float32."""
    optimizer = adamw(model)
    parameters = dict(model.named_parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in range(count):
            x, y = share(data(torch.float32), part, count)
            cast = {name: p.detach().bfloat16().requires_grad_() for name, p in parameters.items()}
            output = torch.func.functional_call(model, cast, (x.bfloat16(),))
            gradients = torch.autograd.grad((output - y).square().mean(), list(cast.values()))
            for p, gradient in zip(parameters.values(), gradients, strict=True):
                p.grad = gradient.float() / count + (0 if p.grad is None else p.grad)
        optimizer.step()


def distance(a: nn.Module, b: nn.Module) -> float:
    """Return how far the weights, biases and gammas of two models lie apart."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return torch.stack([(whole(p.detach()) - whole(q.detach())).norm() for p, q in pairs]).norm().item()


def masters_stay_float32_and_train(rank: int) -> None:
    count, dtype = dist.get_world_size(), torch.float32
    exact, emulated, model = net(dtype), net(dtype), shard_(net(dtype), mp_policy=POLICY)
    train(exact, data(dtype), steps=STEPS)
    train_with_the_same_casts(emulated, count)
    train(model, share(data(dtype)), steps=STEPS)
    # What separates the same casts in one process and in several is the order of sums that are rounded to bfloat16: at
    # worst, as independent as two such runs can be. Each lies about as far from the float32 run, so they lie no
    # further apart than sqrt(2) times that, which is little beside the way they went.
    noise = distance(emulated, exact)
    assert distance(model, emulated) < 2**0.5 * noise
    assert distance(model, exact) < 2**0.5 * noise
    assert noise < 0.02 * distance(net(dtype), exact)
    assert all(tensor.dtype == dtype for tensor in model.state_dict().values())
    gammas = torch.cat([whole(p.detach()) for name, p in model.named_parameters() if name.endswith("gamma")])
    assert not torch.equal(gammas, gammas.bfloat16().float())


def vectors_follow_the_masters(rank: int) -> None:
    model = shard_(net(torch.float32), mp_policy=POLICY)
    train(model, share(data(torch.float32)), steps=3)
    single = net(torch.float32)
    single.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    for each in (model, single):
        tt.refresh_(each)
    assert_same(model, single)


def an_all_bfloat16_model_is_refused_by_torch(rank: int) -> None:
    model = shard_(net(torch.float32).bfloat16())
    assert model.up.weight.dtype == torch.bfloat16
    assert model.up.gamma.dtype == torch.float32
    with pytest.raises(AssertionError, match="uniform original parameter dtype") as refused:
        model(data(torch.bfloat16)[0])
    assert_equal_everywhere(str(sorted(str(refused.value))))


def check(rank: int) -> None:
    masters_stay_float32_and_train(rank)
    vectors_follow_the_masters(rank)
    an_all_bfloat16_model_is_refused_by_torch(rank)


@pytest.mark.parametrize("count", [2, 4])
def test_mixed_precision(count: int) -> None:
    in_processes(count, check)
