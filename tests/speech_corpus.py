"""A small speech corpus for tests: every letter is a tone."""

from pathlib import Path

import numpy as np
import soundfile

from trimtab.models.speech_encoder import SpeechEncoderConfig
from trimtab.tasks.speech import SpeechRecipe

RATE = 8000
TONES = {"A": 400.0, "B": 900.0, "C": 1700.0, " ": 0.0}
SPLITS = {"train": 12, "validation": 5, "test": 4}


def spoken(text: str, seed: int = 0) -> np.ndarray:
    """A tone of 90 ms for each letter and 30 ms without, in a little noise."""
    draw = np.random.RandomState(seed)
    moment = np.arange(int(0.09 * RATE)) / RATE
    pause = np.zeros(int(0.03 * RATE))
    tones = [part for letter in text for part in (0.3 * np.sin(2 * np.pi * TONES[letter] * moment), pause)]
    return np.concatenate(tones) + 0.01 * draw.standard_normal(len(text) * (len(moment) + len(pause)))


def write_corpus(folder: Path) -> Path:
    """Write the three splits."""
    draw = np.random.RandomState(0)
    for split, count in SPLITS.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            text = " ".join("".join(draw.choice(list("ABC"), draw.randint(1, 4))) for _ in range(2))
            soundfile.write(folder / split / f"{i}.wav", spoken(text, i), RATE)
            lines.append(f"{i} {text}\n")
        (folder / split / "all.trans.txt").write_text("".join(lines))
    return folder


def recipe(folder: Path, **changes: object) -> SpeechRecipe:
    """A recipe of a second or two for it."""
    fields: dict[str, object] = {
        "data": str(folder),
        "sample_rate": RATE,
        "model": SpeechEncoderConfig(20, 5, dim=16, depth=1, num_heads=2, mlp_dim=32),
        "optimizer": "adam",
        "lr": 5e-3,
        "steps": 4,
        "batch_size": 6,
        "watch_every": 2,
        "eval_every": 4,
    }
    return SpeechRecipe(**(fields | changes))
