"""Commands that use a trained model: text, translations, transcripts."""
