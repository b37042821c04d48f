"""Text to tokens and back: characters, words, byte-pair encoding; and lines of text files."""
