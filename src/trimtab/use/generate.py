"""`trimtab generate`: text from a trained language model."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import tyro

from trimtab.errors import CheckpointError
from trimtab.models.generation import generate
from trimtab.tasks.language.language_recipe import LanguageRecipe
from trimtab.tasks.language.streams import decoded, encoded, line_end
from trimtab.tasks.text.tokens import FILE, SPECIAL, Kind, read_tokenizer
from trimtab.train.trained import load_trained, open_trained
from trimtab.words import WordsError, parse_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class GenerateOptions:
    """Let a trained language model go on with a text, token by token, and print both.

    RUN is the folder of a run of a language recipe.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""

    prompt: str = ""
    """What the text begins with; without it, the text begins with a line."""

    count: int = 200
    """How many tokens are drawn."""

    temperature: float = 1.0
    """What the logits are divided by: the lower, the likelier are the tokens; 0 takes the likeliest."""

    top_k: int | None = None
    """Draw from so many of the likeliest tokens only."""

    seed: int = 0
    """The same seed gives the same text."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise WordsError(f"--count must be at least 0, got {self.count}")
        if not 0 <= self.temperature < math.inf:
            raise WordsError(f"--temperature must be at least 0 and finite, got {self.temperature:g}")
        if self.top_k is not None and self.top_k < 1:
            raise WordsError(f"--top-k must be at least 1, got {self.top_k}")
        if not -(2**63) <= self.seed < 2**64:
            raise WordsError(f"--seed must be a whole number of 64 bits, got {self.seed}")
        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise WordsError("--prompt is no UTF-8 text") from None


def generate_command(words: Sequence[str]) -> int:
    """Run `trimtab generate` with these words and return the exit code, 0.

    Raises:
        RunFolderError: the folder is no run of a language recipe.
        CheckpointError: it has no whole checkpoint, or lacks its vocabulary.
        WordsError: an option is out of range.
    """
    options = parse_words(GenerateOptions, words, prog="trimtab generate")
    print(generate_text(options))
    return 0


def generate_text(options: GenerateOptions) -> str:
    """The prompt, and what the run's model goes on with. What the model cannot read of the prompt is told on stderr.

    Raises:
        RunFolderError: the folder is no run of a language recipe.
        CheckpointError: it has no whole checkpoint, or lacks its vocabulary.
    """
    trained = open_trained(options.run, LanguageRecipe)
    if FILE not in trained.files:
        raise CheckpointError(f"{options.run} lacks its vocabulary, files/{FILE}: copy the whole run folder")
    kind, tokenizer = trained.recipe.tokens, read_tokenizer(trained.files[FILE])
    model = load_trained(trained, lambda: trained.recipe.make_model(tokenizer.get_vocab_size()))
    start = np.concatenate([[line_end(tokenizer, kind)], *encoded(tokenizer, kind, _lines(options.prompt))])
    _tell_what_is_not_read(options.prompt, tokenizer, kind, len(start), model.config.context)
    try:
        drawn = generate(
            model,
            torch.from_numpy(start.astype(np.int64))[None],
            options.count,
            options.temperature,
            options.top_k,
            torch.Generator().manual_seed(options.seed),
        )
    except ValueError as error:  # the options are in range: the model's logits are not finite
        raise CheckpointError(f"{options.run}: {error}") from None
    text = decoded(tokenizer, kind, drawn[0].tolist())
    between = kind == "words" and options.prompt[-1:].strip() and text[:1].strip()
    return options.prompt + (" " if between else "") + text


def _lines(text: str) -> list[str]:
    *whole, last = text.split("\n")
    return [*(f"{line}\n" for line in whole), last]


def _tell_what_is_not_read(prompt: str, tokenizer: "Tokenizer", kind: Kind, size: int, context: int) -> None:
    for special in SPECIAL:  # are read as themselves
        prompt = prompt.replace(special, " " if kind == "words" else "")
    pieces = [] if kind == "bpe" else prompt.split() if kind == "words" else prompt
    unknown = [piece for piece in dict.fromkeys(pieces) if tokenizer.token_to_id(piece) is None]
    if unknown:
        named = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        print(f"note: the model knows no {named}, which it reads as <unk>", file=sys.stderr)
    if size > context:
        print(f"note: the model reads the last {context} of the prompt's {size - 1} tokens", file=sys.stderr)
