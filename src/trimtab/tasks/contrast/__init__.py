"""Contrastive pre-training of a `trimtab.models.ViT` on images without labels."""

from trimtab.tasks.contrast.contrast_recipe import ContrastRecipe
from trimtab.tasks.contrast.nt_xent import nt_xent

__all__ = ["ContrastRecipe", "nt_xent"]
