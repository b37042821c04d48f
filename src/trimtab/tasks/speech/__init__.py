"""Speech recognition by CTC: sets, features, metrics, decoding, recipes."""

from trimtab.tasks.speech.speech_recipe import SpeechRecipe

__all__ = ["SpeechRecipe"]
