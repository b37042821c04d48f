"""Translation with an encoder-decoder: recipes, pairs of sentences, beam search, BLEU."""

from trimtab.tasks.translation.decoding import Translation, beam_search
from trimtab.tasks.translation.translation_recipe import TranslationRecipe

__all__ = ["Translation", "TranslationRecipe", "beam_search"]
