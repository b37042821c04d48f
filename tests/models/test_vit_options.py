"""The class token, stochastic depth and sizes of the ViT."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_processes import in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import trimtab as tt
from trimtab.errors import RecipeError
from trimtab.models import ViT, ViTConfig, vit_config
from trimtab.models.drop_path import DropPath

SMALL = ViTConfig(8, 2, in_channels=3, num_classes=5, dim=16, depth=2, num_heads=4, pool="cls")


def vit(seed: int = 0, **changes: object) -> ViT:
    torch.manual_seed(seed)
    return ViT(replace(SMALL, **changes))


def theirs(model: ViT) -> nn.Module:
    """The ViT of transformers with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    other = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_ratio * config.dim,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.in_channels,
            num_labels=config.num_classes,
            qkv_bias=config.qkv_bias,
            layer_norm_eps=1e-5,  # torch's own default, which ours has
        )
    ).double()
    other.load_state_dict({their_name(name): value for name, value in model.state_dict().items()} | {
        "vit.embeddings.cls_token": model.class_token.detach()[None, None],
        "vit.embeddings.position_embeddings": model.position.detach()[None],
    })  # fmt: skip
    return other


RENAMED = {
    "class_token": "vit.embeddings.cls_token", "position": "vit.embeddings.position_embeddings",
    "patches.": "vit.embeddings.patch_embeddings.projection.", "blocks.": "vit.layers.",
    "attention.query": "attention.q_proj", "attention.key": "attention.k_proj", "attention.value": "attention.v_proj",
    "attention.out": "attention.o_proj", "attention_norm": "layernorm_before", "mlp_norm": "layernorm_after",
    "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2", "head.": "classifier.",
}  # fmt: skip


def their_name(name: str) -> str:
    if name.startswith("norm."):
        return f"vit.layer{name}"
    for ours, other in RENAMED.items():
        name = name.replace(ours, other)
    return name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_outputs_and_gradients_are_those_of_transformers(training: bool, qkv_bias: bool) -> None:
    ours = vit(init="normal", init_std=0.3, position_std=0.5, qkv_bias=qkv_bias).double().train(training)
    other = theirs(ours).train(training)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    logits, expected = ours(images), other(images).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected_gradient = gradients[their_name(name)].reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "pool", "tokens"),
    [
        ("Ti", "cls", 197),
        ("S", "cls", 197),
        ("B", "cls", 197),
        ("B", "mean", 196),
        ("L", "cls", 197),
        ("H", "cls", 257),
    ],
)
def test_parameters_of_the_published_sizes(size: Any, pool: str, tokens: int) -> None:
    with torch.device("meta"):
        config = vit_config(size, pool=pool)
        ours = ViT(config)
    dim, patch = config.dim, config.patch_size
    block = 12 * dim**2 + 13 * dim  # 4 D² + 4 D of attention, 8 D² + 5 D of the MLP, 4 D of two norms
    ends = 3 * patch**2 * dim + dim + tokens * dim + 2 * dim + 1000 * dim + 1000
    expected = config.depth * block + ends + (dim if pool == "cls" else 0)
    assert sum(p.numel() for p in ours.parameters()) == expected
    if pool == "cls":
        transformers = pytest.importorskip("transformers")
        with torch.device("meta"):
            other = transformers.ViTForImageClassification(
                transformers.ViTConfig(
                    hidden_size=dim, num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
                    intermediate_size=4 * dim, patch_size=patch, num_labels=1000,
                )
            )  # fmt: skip
        assert sum(p.numel() for p in other.parameters()) == expected


def test_a_size_takes_changes_and_an_unknown_one_is_refused() -> None:
    changed = vit_config("S", image_size=32, patch_size=4, num_classes=10)
    assert (changed.dim, changed.num_heads, changed.num_patches) == (384, 6, 64)
    with pytest.raises(RecipeError, match="size must be one of Ti, S, B, L, H; got 'XL'"):
        vit_config("XL")  # type: ignore[arg-type]


def test_without_classes_the_features_come_out() -> None:
    for pool in ("mean", "cls"):
        headless, whole = vit(pool=pool, num_classes=0), vit(pool=pool)
        for name, value in headless.state_dict().items():
            value.copy_(whole.state_dict()[name])
        assert "head.weight" not in headless.state_dict()
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(headless(images), whole.features(images))
        assert torch.equal(whole(images), whole.head(whole.features(images)))
        assert headless(images).shape == (2, 16)


def test_the_class_token_is_what_the_head_sees() -> None:
    model = vit()
    images = torch.randn(2, 3, 8, 8)
    gradient = torch.autograd.grad(model(images).sum(), model.blocks[-1].mlp.down.bias, retain_graph=True)[0]
    assert gradient.any()
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    model(images)
    assert seen[0].shape == (2, 17, 16)
    torch.testing.assert_close(model.norm(seen[0][:, 0]), model.features(images))


def test_drop_path_leaves_out_whole_examples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.3)
    x = torch.rand(20_000, 3, 2) + 1
    dropped = drop(x)
    kept = dropped.ne(0).flatten(1)
    assert torch.equal(kept.all(dim=1), kept.any(dim=1))
    torch.testing.assert_close(dropped[kept.all(dim=1)], x[kept.all(dim=1)] / 0.7)
    share = kept.all(dim=1).double().mean().item()
    assert share == pytest.approx(0.7, abs=4 * (0.3 * 0.7 / 20_000) ** 0.5)  # four deviations of a binomial share
    bfloat16 = drop(torch.ones(20_000, 1, dtype=torch.bfloat16)).ne(0)
    assert bfloat16.double().mean().item() == pytest.approx(0.7, abs=0.013)
    assert drop.eval()(x) is x


def test_drop_path_rises_over_the_depth_and_nothing_is_dropped_in_eval() -> None:
    model = vit(depth=4, drop_path=0.3, dropout=0.2)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    images = torch.randn(4, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    plain = vit(depth=4)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(images), plain(images))


def test_an_example_without_its_branches_is_that_of_the_blocks_before() -> None:
    model = vit(drop_path=0.999999)  # the second block drops both halves of all examples
    images = torch.randn(8, 3, 8, 8)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
    logits = model(images)
    assert torch.equal(logits, model.head(model.norm(seen[0])[:, 0]))


def test_rates_of_zero_draw_no_random_numbers() -> None:
    model = vit()
    state = torch.random.get_rng_state()
    model(torch.zeros(2, 3, 8, 8)).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_patch_gain_scales_the_start_of_the_patch_embedding_alone() -> None:
    plain, scaled = vit().state_dict(), vit(patch_gain=0.125).state_dict()
    for name, value in scaled.items():
        assert torch.equal(value, plain[name] * (0.125 if name == "patches.weight" else 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"pool": "max"}, "pool must be one of mean, cls; got 'max'"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"patch_gain": 0.0}, "patch_gain must be a positive number, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(SMALL, **changes)


def test_sigma_takes_every_option_and_keeps_the_function() -> None:
    model = vit(init="normal", init_std=0.3, qkv_bias=False, drop_path=0.2, dropout=0.1, patch_gain=0.125).eval()
    images = torch.randn(2, 3, 8, 8)
    before = model(images)
    tt.stabilize_(model, "sigma")
    assert sum(name.endswith("gamma") for name, _ in model.named_parameters()) == 2 + 6 * 2
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)  # sigma is good to float32
    tt.fold_(model)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def trains_sharded_as_in_one_process(rank: int) -> None:
    torch.manual_seed(1)
    images, targets = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    models = []
    for sharded in (False, True):
        model = tt.stabilize_(vit(init="normal", init_std=0.3), "sigma")
        if sharded:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            own = slice(rank, None, dist.get_world_size()) if sharded else slice(None)
            optimizer.zero_grad()
            (model(images[own]) - targets[own]).square().mean().backward()
            optimizer.step()
        models.append(model)
    expected = dict(models[0].named_parameters())
    for name, parameter in models[1].named_parameters():
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(parameter.full_tensor(), expected[name], rtol=1e-4, atol=1e-5)
    assert models[1].class_token.to_local().shape == (8,)


def test_the_class_token_is_sharded_like_the_rest() -> None:
    in_processes(2, trains_sharded_as_in_one_process)
