"""Recipes for the small image sets: functions that return a typed, frozen config.

`*-deit` is the strong baseline, with what DeiT (Touvron et al., arXiv 2012.12877) trains with: pre-LN, AdamW, warmup
and weight decay. `*-sigma` has none of these, but LARS, as in the paper of sigma-Reparam (Zhai et al., arXiv
2303.06296); `*-sigma-preln` keeps the LayerNorm. The numbers of the small sets are our own.
"""

from dataclasses import replace
from typing import Any

from trimtab.models.vit import ViTConfig
from trimtab.tasks.images.augment import Augment
from trimtab.tasks.images.images_recipe import ImagesRecipe

__all__ = [
    "DEIT",
    "SIGMA",
    "SIGMA_PRELN",
    "ImagesRecipe",
    "vit_cifar10",
    "vit_cifar10_deit",
    "vit_cifar10_sigma",
    "vit_cifar10_sigma_preln",
    "vit_digits",
    "vit_fashion",
    "vit_fashion_deit",
    "vit_fashion_sigma",
    "vit_fashion_sigma_preln",
]

# What the three ways of training are, whatever the data; learning rate and warmup of the first are the recipe's own.
DEIT: dict[str, Any] = {
    "stabilizer": "none",
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "clip": None,
    "schedule": "cosine",
}
# With gamma = 1 no output depends on the size of a weight, and LARS moves each weight by a share of its size. So where
# weights start (init, init_std, patch_gain) does not matter, but for their directions.
SIGMA_PRELN: dict[str, Any] = {
    "stabilizer": "sigma:gamma_init=one",
    # the rate of gammas and biases, and the product of both, the share of its norm that a weight moves by
    "optimizer": "lars",
    "lr": 0.005,
    "trust_coefficient": 0.4,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "clip": None,
    "schedule": "cosine",
}
SIGMA: dict[str, Any] = {**SIGMA_PRELN, "stabilizer": "sigma:gamma_init=one:remove_norms=true"}
# four blocks bear gammas that start at sigma(W), and then want to move slowly: benchmarks/images.py
_SHALLOW = {**SIGMA, "stabilizer": "sigma:remove_norms=true", "lr": 0.0003, "trust_coefficient": 6.667}


def vit_digits() -> ImagesRecipe:
    """A small ViT on 8×8 handwritten digits, offline, in seconds.

    0.2 million parameters, pre-LN; .98 test accuracy. Evaluated on the test set.
    """
    return ImagesRecipe(
        data="digits",
        model=ViTConfig(
            image_size=8,
            patch_size=2,
            in_channels=1,
            num_classes=10,
            dim=64,
            depth=4,
            num_heads=4,
            # at its best learning rate the most accurate of this, PyTorch's default, N(0, 0.1²), N(0, 0.2²) and
            # truncated N(0, 0.02²)
            init="xavier",
            position_std=0.5,
        ),
    )


def vit_fashion() -> ImagesRecipe:
    """A small ViT on Fashion-MNIST, in minutes: pre-LN, AdamW, cosine.

    0.2 million parameters. Evaluated on the test set.
    """
    return ImagesRecipe(
        data="fashion-mnist",
        model=ViTConfig(
            image_size=28,
            patch_size=7,
            in_channels=1,
            num_classes=10,
            dim=64,
            depth=4,
            num_heads=4,
            init="xavier",
            position_std=0.5,
        ),
        lr=3e-3,
        schedule="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        clip=1.0,
        steps=3000,
        watch_every=50,
        eval_every=500,
    )


def vit_cifar10() -> ImagesRecipe:
    """A small ViT on CIFAR-10, in minutes: pre-LN, AdamW, cosine.

    0.2 million parameters, images cropped and mirrored at random. Evaluated on the test set.
    """
    fashion = vit_fashion()
    return replace(
        fashion,
        data="cifar10",
        model=replace(fashion.model, image_size=32, in_channels=3, patch_size=4),
        augment=Augment(crop=4, flip=True),
    )


def vit_fashion_deit() -> ImagesRecipe:
    """Fashion-MNIST, the baseline: pre-LN, AdamW, warmup, weight decay."""
    return replace(vit_fashion(), **DEIT, lr=3e-3, warmup_steps=150)


def vit_fashion_sigma() -> ImagesRecipe:
    """Fashion-MNIST, sigma-Reparam without LayerNorm, warmup, weight decay: LARS."""
    return replace(vit_fashion(), **_SHALLOW)


def vit_fashion_sigma_preln() -> ImagesRecipe:
    """Fashion-MNIST, sigma-Reparam with pre-LN, without warmup, weight decay: LARS."""
    return replace(vit_fashion(), **SIGMA_PRELN)


def vit_cifar10_deit() -> ImagesRecipe:
    """CIFAR-10, the baseline: pre-LN, AdamW, warmup, weight decay."""
    return replace(vit_cifar10(), **DEIT, lr=3e-3, warmup_steps=150)


def vit_cifar10_sigma() -> ImagesRecipe:
    """CIFAR-10, sigma-Reparam without LayerNorm, warmup, weight decay: LARS."""
    return replace(vit_cifar10(), **_SHALLOW)


def vit_cifar10_sigma_preln() -> ImagesRecipe:
    """CIFAR-10, sigma-Reparam with pre-LN, without warmup, weight decay: LARS."""
    return replace(vit_cifar10(), **SIGMA_PRELN)
