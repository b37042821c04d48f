"""Language modelling with a `trimtab.models.gpt.GPT`."""

from trimtab.tasks.language.language_recipe import LanguageRecipe
from trimtab.tasks.language.recipes import gpt_shakespeare

__all__ = ["LanguageRecipe", "gpt_shakespeare"]
