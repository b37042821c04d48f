"""Image data sets by name, or from a folder of images."""

from trimtab.tasks.images.sets.image_data import ImageData, Split
from trimtab.tasks.images.sets.load import load_images

__all__ = ["ImageData", "Split", "load_images"]
