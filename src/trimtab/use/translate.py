"""`trimtab translate`: lines of text through a trained model."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from trimtab.errors import CheckpointError
from trimtab.models.encoder_decoder import EncoderDecoder
from trimtab.tasks.text.lines import decode_text, lines_of, read_text
from trimtab.tasks.text.tokens import decode, encode
from trimtab.tasks.translation.sentences import padded, plain_tokenizer
from trimtab.tasks.translation.translation_recipe import TranslationRecipe, tokenizers_of, translated
from trimtab.train.buckets import cut
from trimtab.train.trained import load_trained, open_trained
from trimtab.use.wide_beam import tell_of_wide_beam
from trimtab.words import WordsError, parse_words

_TOKENS = 8192  # of the sentences that are translated together, with their padding
_LINES = 1024  # that are translated before the first of them is written
_LONGEST = 1024  # tokens of a line that are read, or as many as the longest in training had


@dataclass(frozen=True)
class TranslateOptions:
    """Translate lines of text by a trained model, one line for each, by beam search.

    RUN is the folder of a run of a translation recipe; FILE has the lines, UTF-8. Without it they come from
    standard input.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""

    file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = None
    """The lines; packed by gzip or not."""

    beam: int | None = None
    """Hypotheses of each sentence, 1 is greedy search; None: as the run was tested."""

    length_penalty: float | None = None
    """Larger ones favour longer translations, 0 is none; None: as the run was tested."""

    def __post_init__(self) -> None:
        if self.beam is not None and self.beam < 1:
            raise WordsError(f"--beam must be at least 1, got {self.beam}")
        if self.length_penalty is not None and not 0 <= self.length_penalty < math.inf:
            raise WordsError(f"--length-penalty must be at least 0 and finite, got {self.length_penalty:g}")


def translate_command(words: Sequence[str]) -> int:
    """Run `trimtab translate` with these words and return the exit code, 0.

    Raises:
        RunFolderError: the folder is no run of a translation recipe.
        CheckpointError: it has no whole checkpoint, or lacks its vocabulary.
        DataError: the file cannot be read, or the lines are no UTF-8 text.
        RecipeError: the beam is wider than the vocabulary.
        WordsError: an option is out of range.
    """
    options = parse_words(TranslateOptions, words, prog="trimtab translate")
    translate = translator(options.run, options.beam, options.length_penalty)
    file = options.file
    text = decode_text(sys.stdin.buffer.read(), "standard input") if file is None else read_text(file)
    lines = lines_of(text)
    for first in range(0, len(lines), _LINES):
        for line in translate(lines[first : first + _LINES], first):
            print(line)
        sys.stdout.flush()
    return 0


def translator(
    run: str | Path, beam: int | None = None, length_penalty: float | None = None
) -> Callable[..., list[str]]:
    """Make what translates lines by the model of a run: to one line each, an empty one of an empty line.

    It takes lines, and how many came before them, 0 if that is left out. Lines longer than any that was trained on are
    translated as well as it goes, of those longer than 1,024 tokens the beginning, which is told on stderr. No
    character is unknown to a vocabulary of byte pairs.

    Args:
        run: its folder.
        beam: hypotheses of each sentence; None for the recipe's. More than 100 are told of on stderr, too.
        length_penalty: see `beam_search`; None for the recipe's.

    Raises:
        RunFolderError: the folder is no run of a translation recipe.
        CheckpointError: it has no whole checkpoint, or lacks its vocabulary, or has that of another model.
        RecipeError: `beam` or `length_penalty` is out of range.
    """
    trained = open_trained(run, TranslationRecipe)
    recipe = trained.recipe
    recipe = replace(
        recipe,
        beam=recipe.beam if beam is None else beam,
        length_penalty=recipe.length_penalty if length_penalty is None else length_penalty,
    )
    tell_of_wide_beam(recipe.beam)
    texts = tokenizers_of(trained.files)
    if texts is None:
        raise CheckpointError(f"{run} lacks its vocabulary in files/: copy the whole run folder")
    source, target = map(plain_tokenizer, texts)
    sizes = source.get_vocab_size(), target.get_vocab_size()
    if sizes != (recipe.model.source_vocab, recipe.model.target_vocab):
        raise CheckpointError(
            f"{run}: the vocabularies in files/ have {sizes[0]:,} and {sizes[1]:,} tokens, and the model "
            f"{recipe.model.source_vocab:,} and {recipe.model.target_vocab:,}: copy the whole run folder"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_trained(trained, lambda: EncoderDecoder(recipe.model)).to(device)

    def translate(lines: Sequence[str], before: int = 0) -> list[str]:
        found = [""] * len(lines)
        sentences = {number: line.strip() for number, line in enumerate(lines) if line.strip()}
        if not sentences:
            return found
        rows = dict(zip(sentences, encode(source, list(sentences.values())), strict=True))
        longest = max(_LONGEST, recipe.max_length)
        _tell_of_long_ones({before + number: len(row) + 1 for number, row in rows.items()}, recipe.max_length, longest)
        rows = {number: row[: longest - 1] for number, row in rows.items()}
        numbers = sorted(rows, key=lambda number: len(rows[number]))  # those of similar length come together
        lengths = torch.tensor([[len(rows[number])] for number in numbers])
        for together in torch.tensor(numbers).split(cut(lengths, _TOKENS, 1)):
            batch = padded([rows[number] for number in together.tolist()]).to(device)
            tokens = translated(
                model, batch, recipe.model.target_vocab, recipe.beam, recipe.length_penalty, recipe.most_tokens
            )
            for number, text in zip(together.tolist(), decode(target, tokens), strict=True):
                found[number] = " ".join(text.split())  # one line, whatever the model has written
        return found

    return translate


def _tell_of_long_ones(lengths: Mapping[int, int], most: int, longest: int) -> None:
    for number, length in lengths.items():
        if length > most:
            what = "its translation may be poor" if length <= longest else f"only its first {longest:,} are read"
            print(
                f"note: line {number + 1} has {length:,} tokens, and the longest sentences in training had {most}: "
                f"{what}",
                file=sys.stderr,
            )
