from dataclasses import replace

import pytest
import torch

from trimtab.errors import RecipeError
from trimtab.models import ViT, ViTConfig


def config(**changes: object) -> ViTConfig:
    return replace(ViTConfig(8, 2, in_channels=3, num_classes=5, dim=16, depth=2, num_heads=4), **changes)


def reference(vit: ViT, images: torch.Tensor) -> torch.Tensor:
    """The pre-LN forward, slowly: patches cut by hand, one head at a time, the softmax written out."""
    size, dim, heads = vit.config.patch_size, vit.config.dim, vit.config.num_heads
    side = vit.config.image_size // size
    kernel = vit.patches.weight.flatten(1)
    tokens = []
    for row in range(side):
        for column in range(side):
            patch = images[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            tokens.append(patch.flatten(1) @ kernel.T + vit.patches.bias)
    x = torch.stack(tokens, dim=1) + vit.position
    for block in vit.blocks:
        y = block.attention_norm(x)
        query, key, value = (getattr(block.attention, name)(y) for name in ("query", "key", "value"))
        mixed = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            logits = query[..., part] @ key[..., part].transpose(1, 2) / (dim // heads) ** 0.5
            mixed.append(logits.softmax(dim=-1) @ value[..., part])
        x = x + block.attention.out(torch.cat(mixed, dim=-1))
        x = x + block.mlp.down(torch.nn.functional.gelu(block.mlp.up(block.mlp_norm(x))))
    return vit.head(vit.norm(x).mean(dim=1))


def test_the_forward_is_the_one_written_out_by_hand() -> None:
    torch.manual_seed(0)
    vit = ViT(config(init="normal", init_std=0.3)).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(vit(images), reference(vit, images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_norms_stand_where_the_config_puts_them(norm: str) -> None:
    torch.manual_seed(0)
    vit = ViT(config(norm=norm))
    norms = [name for name, module in vit.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    inside = [f"blocks.{block}.{name}_norm" for block in range(2) for name in ("attention", "mlp")]
    assert norms == {"pre": [*inside, "norm"], "post": inside, "none": []}[norm]
    assert vit(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_post_norm_normalises_what_leaves_a_block() -> None:
    torch.manual_seed(0)
    vit = ViT(config(norm="post", init="normal", init_std=1.0))
    x = vit.blocks[0](torch.randn(4, 16, 16) * 100)
    torch.testing.assert_close(x.std(dim=-1, correction=0), torch.ones(4, 16), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("init", "std", "low", "high"),
    [("normal", 0.4, 0.37, 0.43), ("trunc_normal", 0.02, 0.0165, 0.0185), ("xavier", 1.0, 0.16, 0.19)],
)
def test_weights_start_where_the_config_says(init: str, std: float, low: float, high: float) -> None:
    torch.manual_seed(0)
    vit = ViT(config(dim=32, init=init, init_std=std, position_std=0.5))
    weight = vit.blocks[0].attention.query.weight  # 1,024 numbers: their deviation is good to about 2 %
    assert low < weight.std() < high  # cut at 2 std: 0.88 std; Glorot's for 32 + 32: sqrt(2 / 64)
    assert weight.abs().max() <= {"normal": 5, "trunc_normal": 2, "xavier": 1}[init] * std
    assert 0.45 < vit.position.std() < 0.55
    assert all(not parameter.any() for name, parameter in vit.named_parameters() if name.endswith("bias"))


def test_xavier_reaches_the_patch_embedding_too() -> None:
    torch.manual_seed(0)
    weight = ViT(config(dim=64, init="xavier")).patches.weight  # 12 inputs, 64 outputs
    assert weight.abs().max() <= (6 / (12 + 64)) ** 0.5
    assert weight.std().item() == pytest.approx((2 / (12 + 64)) ** 0.5, rel=0.1)


def test_the_same_seed_gives_the_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(ViT(config()))
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "image_size 8 is not a multiple of patch_size 3"),
        ({"dim": 18}, "dim 18 is not a multiple of num_heads 4"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"norm": "rms"}, "norm must be one of pre, post, none; got 'rms'"),
        ({"init": "zeros"}, "init must be one of"),
        ({"init_std": float("nan")}, "init_std must be a positive number"),
        ({"position_std": -1.0}, "position_std must be a positive number"),
    ],
)
def test_a_config_that_fits_no_model_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        config(**changes)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images of shape .*3, 8, 8.*got \(2, 1, 8, 8\)"):
        ViT(config())(torch.zeros(2, 1, 8, 8))
