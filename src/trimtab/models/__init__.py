"""Reference models, each one readable file."""

from trimtab.models.vit import ViT, ViTConfig, vit_config

__all__ = ["ViT", "ViTConfig", "vit_config"]
