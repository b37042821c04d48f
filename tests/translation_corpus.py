"""A small language pair for tests of translation: the words of a sentence, each by its own translation."""

import random
from pathlib import Path
from typing import Any

from trimtab.models.encoder_decoder import EncoderDecoderConfig
from trimtab.tasks.translation import TranslationRecipe

WORDS = {
    "the": "der", "dog": "Hund", "cat": "Katze", "runs": "rennt", "sleeps": "schläft", "a": "ein", "big": "großer",
    "small": "kleiner", "and": "und", "here": "hier",
}  # fmt: skip
VOCABULARY = 290
"""Bytes, special tokens and some merges; these sentences make more."""


def sentences(count: int, seed: int) -> tuple[list[str], list[str]]:
    """English sentences of two to seven words, and their German."""
    draw = random.Random(seed)
    english = [draw.choices(list(WORDS), k=draw.randint(2, 7)) for _ in range(count)]
    return [" ".join(words) for words in english], [" ".join(WORDS[word] for word in words) for words in english]


def write_folder(folder: Path, train: int = 80, valid: int = 12, test: int = 10) -> Path:
    """A folder as `TranslationRecipe` reads it."""
    folder.mkdir()
    for seed, (part, count) in enumerate({"train": train, "valid": valid, "test": test}.items()):
        for language, lines in zip(("en", "de"), sentences(count, seed), strict=True):
            (folder / f"{part}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def small_recipe(folder: Path, **changes: Any) -> TranslationRecipe:
    """A recipe of seconds."""
    model = {
        "source_vocab": VOCABULARY, "target_vocab": VOCABULARY, "dim": 32, "encoder_depth": 1, "decoder_depth": 1,
        "num_heads": 2, "norm": "pre", "dropout": 0.0,
    }  # fmt: skip
    options: dict[str, Any] = {
        "data": str(folder), "source": "en", "target": "de", "model": EncoderDecoderConfig(**model),
        "optimizer": "adam", "lr": 1e-2, "steps": 30, "batch_tokens": 512, "watch": False, "watch_every": 15,
        "eval_every": 15, "checkpoint_every": 15,
    }  # fmt: skip
    return TranslationRecipe(**{**options, **changes})
