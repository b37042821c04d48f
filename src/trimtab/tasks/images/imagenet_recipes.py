"""Recipes for ImageNet-1k: five sizes of ViT, three ways of training.

`vit-{ti16,s16,b16,l16,h14}-{deit,sigma,sigma-preln}`, by the name of the data ("imagenet"); 300 epochs, bfloat16.

Whose numbers they are:
- DeiT (Touvron et al., arXiv 2012.12877, table 9): the batch, learning rate, decay, warmup, schedule, epochs,
  stochastic depth and augmentations of "deit". What its code does otherwise is told in docs/images.md.
- The paper of sigma-Reparam (Zhai et al., arXiv 2303.06296) and its code: no LayerNorm, warmup or decay,
  LARS, gamma 1, stochastic depth 0.1 (B) and 0.2 (L), and the gain of the patch embedding from L on.
- Our own, tried on small sets only: the learning rate and trust coefficient of LARS, with batch and augmentations as in
  "deit"; L and H under "deit", which DeiT has not; H like L.
"""

from collections.abc import Callable
from typing import Any

from trimtab.models.vit import Size, vit_config
from trimtab.tasks.images.augment import Augment
from trimtab.tasks.images.images_recipe import ImagesRecipe
from trimtab.tasks.images.recipes import DEIT, SIGMA, SIGMA_PRELN

_BATCH = 1024
_EPOCH = 1_281_167 // _BATCH  # steps; the last, short batch of an epoch is left out
_SIZES: dict[str, Size] = {"ti16": "Ti", "s16": "S", "b16": "B", "l16": "L", "h14": "H"}
# DeiT's magnitude of RandAugment is 9 of 10, ours of 30
_AUGMENT = Augment(rand_augment=(2, 27), erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
_WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "deit": ({**DEIT, "lr": 5e-4 * _BATCH / 512, "warmup_steps": 5 * _EPOCH}, "pre-LN, AdamW, warmup, decay (DeiT)"),
    "sigma": (SIGMA, "sigma-Reparam, LARS, no LayerNorm, warmup, decay"),
    "sigma-preln": (SIGMA_PRELN, "sigma-Reparam with pre-LN, LARS, no warmup, decay"),
}


def _recipe(name: str, way: str) -> ImagesRecipe:
    large = name in ("l16", "h14")
    return ImagesRecipe(
        data="imagenet",
        model=vit_config(
            _SIZES[name],
            pool="cls",
            drop_path=0.2 if large else 0.1,
            patch_gain=0.125 if large and way != "deit" else 1.0,
        ),
        augment=_AUGMENT,
        batch_size=_BATCH,
        steps=300 * _EPOCH,
        precision="bf16",
        watch_every=250,
        eval_every=2500,
        checkpoint_every=1250,
        **_WAYS[way][0],
    )


def _maker(name: str, way: str) -> Callable[[], ImagesRecipe]:
    def make() -> ImagesRecipe:
        return _recipe(name, way)

    make.__doc__ = f"ImageNet-1k, ViT-{_SIZES[name]}/{name[-2:]}: {_WAYS[way][1]}."
    return make


IMAGENET_RECIPES = {f"vit-{name}-{way}": _maker(name, way) for name in _SIZES for way in _WAYS}
"""Name to the function that returns the recipe."""
