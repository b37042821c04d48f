"""Speech sets: corpora by name, and folders of recordings with transcripts."""

from trimtab.tasks.speech.sets.load import load_speech
from trimtab.tasks.speech.sets.speech_data import SpeechData

__all__ = ["SpeechData", "load_speech"]
