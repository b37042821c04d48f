"""Reference models, each one readable file."""

from trimtab.models.vit import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig"]
