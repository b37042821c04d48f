"""Recipes for contrastive pre-training: functions that return a typed, frozen config.

`simclr-*` is SimCLR with a pre-LN encoder, LARS and warmup, `*-frozen` the same with the frozen patch embedding of MoCo
v3 (Chen et al., arXiv 2104.02057); `*-sigma` has sigma-Reparam without LayerNorm and warmup, `*-sigma-preln` with
LayerNorm (Zhai et al., arXiv 2303.06296). The numbers are our own, for sizes that two cores train.
"""

from collections.abc import Callable
from dataclasses import replace

from trimtab.tasks.contrast.contrast_recipe import ContrastRecipe
from trimtab.tasks.images.recipes import vit_fashion

SIGMA = "sigma:gamma_init=one"
# LARS moves each weight by a share of its size, and with gamma = 1 no output depends on that size. So, unlike under
# AdamW, where weights start does not matter but for their directions.


def simclr_fashion() -> ContrastRecipe:
    """SimCLR without labels on Fashion-MNIST, a small ViT: pre-LN, LARS, warmup.

    0.2 million parameters. Evaluated on the test set.
    """
    return ContrastRecipe(
        data="fashion-mnist",
        model=replace(vit_fashion().model, num_classes=0),
        optimizer="lars",
        lr=0.02,
        trust_coefficient=0.1,
        schedule="cosine",
        warmup_steps=100,
        batch_size=128,
        steps=1000,
        watch_every=50,
        eval_every=250,
    )


def simclr_cifar10() -> ContrastRecipe:
    """SimCLR without labels on CIFAR-10, a small ViT: pre-LN, LARS, warmup.

    0.2 million parameters. Evaluated on the test set.
    """
    fashion = simclr_fashion()
    return replace(fashion, data="cifar10", model=replace(fashion.model, image_size=32, in_channels=3, patch_size=4))


def simclr_fashion_sigma() -> ContrastRecipe:
    """SimCLR on Fashion-MNIST, sigma-Reparam without LayerNorm and warmup: LARS."""
    return _sigma(simclr_fashion())


def simclr_fashion_sigma_preln() -> ContrastRecipe:
    """SimCLR on Fashion-MNIST, sigma-Reparam with pre-LN, without warmup: LARS."""
    return _sigma_preln(simclr_fashion())


def simclr_fashion_frozen() -> ContrastRecipe:
    """SimCLR on Fashion-MNIST, pre-LN with the frozen patch embedding of MoCo v3: LARS, warmup."""
    return replace(simclr_fashion(), freeze_patches=True)


def simclr_cifar10_sigma() -> ContrastRecipe:
    """SimCLR on CIFAR-10, sigma-Reparam without LayerNorm and warmup: LARS."""
    return _sigma(simclr_cifar10())


def simclr_cifar10_sigma_preln() -> ContrastRecipe:
    """SimCLR on CIFAR-10, sigma-Reparam with pre-LN, without warmup: LARS."""
    return _sigma_preln(simclr_cifar10())


def simclr_cifar10_frozen() -> ContrastRecipe:
    """SimCLR on CIFAR-10, pre-LN with the frozen patch embedding of MoCo v3: LARS, warmup."""
    return replace(simclr_cifar10(), freeze_patches=True)


def _sigma_preln(recipe: ContrastRecipe) -> ContrastRecipe:
    return replace(recipe, stabilizer=SIGMA, warmup_steps=0)


def _sigma(recipe: ContrastRecipe) -> ContrastRecipe:
    return replace(_sigma_preln(recipe), model=replace(recipe.model, norm="none"))


CONTRAST_RECIPES: dict[str, Callable[[], ContrastRecipe]] = {
    "simclr-fashion": simclr_fashion,
    "simclr-fashion-sigma": simclr_fashion_sigma,
    "simclr-fashion-sigma-preln": simclr_fashion_sigma_preln,
    "simclr-fashion-frozen": simclr_fashion_frozen,
    "simclr-cifar10": simclr_cifar10,
    "simclr-cifar10-sigma": simclr_cifar10_sigma,
    "simclr-cifar10-sigma-preln": simclr_cifar10_sigma_preln,
    "simclr-cifar10-frozen": simclr_cifar10_frozen,
}
"""Name to the function that returns the recipe."""
