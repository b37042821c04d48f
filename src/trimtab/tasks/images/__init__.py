"""Image classification with a `trimtab.models.ViT`."""

from trimtab.tasks.images.data import ImageData, load_images
from trimtab.tasks.images.recipes import ImagesRecipe, vit_digits, vit_fashion

__all__ = ["ImageData", "ImagesRecipe", "load_images", "vit_digits", "vit_fashion"]
