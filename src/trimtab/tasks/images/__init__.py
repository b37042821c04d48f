"""Image classification with a `trimtab.models.ViT`."""

from trimtab.tasks.images.augment import Augment
from trimtab.tasks.images.images_recipe import ImagesRecipe
from trimtab.tasks.images.recipes import vit_cifar10, vit_digits, vit_fashion
from trimtab.tasks.images.sets import ImageData, Split, load_images

__all__ = [
    "Augment",
    "ImageData",
    "ImagesRecipe",
    "Split",
    "load_images",
    "vit_cifar10",
    "vit_digits",
    "vit_fashion",
]
