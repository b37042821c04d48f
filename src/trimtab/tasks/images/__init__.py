"""Image classification with a `trimtab.models.ViT`."""

from trimtab.tasks.images.augment import Augment
from trimtab.tasks.images.data import ImageData, Split, load_images
from trimtab.tasks.images.images_recipe import ImagesRecipe
from trimtab.tasks.images.recipes import vit_cifar10, vit_digits, vit_fashion

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
