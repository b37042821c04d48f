"""`TranslationRecipe`: translation with an encoder-decoder, as a typed, frozen config."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import DataError, RecipeError
from trimtab.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from trimtab.tasks.notices import warn
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Examples, Task
from trimtab.tasks.text import tokens as vocabulary
from trimtab.tasks.text.tokens import LEAST_BYTE_PAIRS, PAD
from trimtab.tasks.translation import bleu
from trimtab.tasks.translation.decoding import beam_search
from trimtab.tasks.translation.pairs import find_corpus
from trimtab.tasks.translation.sentences import Encoded, Sentences, load_encoded, plain_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Batch = tuple[Tensor, Tensor, Tensor]
"""Source (B, S) and target (B, T), padded, with ends and the target's begin; and which sentences these are, (B,)."""

Decode = Literal["always", "test", "never"]

_SOURCE_FILE, _TARGET_FILE = f"source-{vocabulary.FILE}", f"target-{vocabulary.FILE}"
_MOST_TOKENS = 1024  # of a translation
_ROWS_TIMES_VOCABULARY = 2**25  # numbers in the logits of hypotheses that are decoded together


@dataclass(frozen=True, kw_only=True)
class TranslationRecipe(Recipe):
    """An encoder-decoder that translates, by cross-entropy with label smoothing, in byte pairs.

    Metrics: "bleu", which decides, by sacrebleu on the text as it stands (`Task.facts` has its signature), and
    "eval_loss", nats per target token, ends included, without label smoothing. While training they are measured on the
    validation part, with translations by greedy search; the test part is measured once, at the end, by beam search.

    The vocabularies are learned on the training part alone: with `model.tied` "all" one for both languages, else one
    each. Left out of training, and counted in the run's facts, are pairs with an empty line and those with a sentence
    above `max_length`. Nothing is left out of validation and test, and no sentence is cut.

    Attributes:
        data: "multi30k", "tatoeba-deu-eng", a folder or two files of text, see `find_corpus`.
        source: language that is translated from.
        target: language that is translated to.
        test: name of the test files, see `find_corpus`.
        model: the encoder-decoder; its vocabularies are as large as it says.
        max_length: tokens of the longest sentence that is trained on, its end included.
        label_smoothing: share of the target's probability that is spread over the vocabulary in training.
        decode: when sentences are translated and BLEU is measured: at every evaluation ("always"), on the test part
            alone ("test"), or "never"; without it "eval_loss" decides.
        beam: hypotheses of each sentence in the search on the test part, no more than tokens of the target vocabulary;
            1 is greedy.
        length_penalty: of that search, see `beam_search`.

    Raises:
        RecipeError: a field is out of range, or has the wrong type.
    """

    data: str
    source: str
    target: str
    test: str | None = None
    model: EncoderDecoderConfig
    max_length: int = 100
    label_smoothing: float = 0.1
    decode: Decode = "always"
    beam: int = 4
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "beam"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.beam > self.model.target_vocab:
            raise RecipeError(
                f"beam must be at most model.target_vocab, {self.model.target_vocab:,}, and 4 to 10 are usual; got "
                f"{self.beam:,}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        if not 0 <= self.length_penalty < math.inf:
            raise RecipeError(f"length_penalty must be at least 0, got {self.length_penalty}")
        for size in (self.model.source_vocab, self.model.target_vocab):
            if size < LEAST_BYTE_PAIRS:
                raise RecipeError(
                    f"a vocabulary of byte pairs needs a size of at least {LEAST_BYTE_PAIRS}; got {size}: "
                    "--model.source-vocab 4000 --model.target-vocab 4000"
                )
        if self.model.pad != PAD:
            raise RecipeError(f"model.pad must be {PAD}, the padding of the vocabularies; got {self.model.pad}")

    @property
    def most_tokens(self) -> int:
        """Of a translation: 1,024, or what the longest sentences in training need."""
        return max(_MOST_TOKENS, 2 * self.max_length)

    def task(self) -> Task:
        """Load the data and draw the model.

        Raises:
            DataError: the data cannot be read, or no pair is left to train on.
            RecipeError: the text makes no vocabulary of that size, or sacrebleu is needed and not installed.
        """
        config = self.model
        corpus = find_corpus(self.data, self.source, self.target, self.test)
        encoded = load_encoded(corpus, config.source_vocab, config.target_vocab, config.tied == "all")
        chosen, facts = self._to_train_on(encoded)
        if self.decode != "never":
            facts["bleu_signature"] = bleu.signature()
        tokenizer = plain_tokenizer(encoded.target_tokenizer)
        whole = {part: torch.arange(len(references)) for part, references in encoded.references.items()}
        return Task(
            model=EncoderDecoder(config),
            train=_examples(encoded.source["train"], encoded.target["train"], chosen),
            loss=self._loss,
            weight=weight,
            evaluation=_examples(encoded.source["valid"], encoded.target["valid"], whole["valid"]),
            test=_examples(encoded.source["test"], encoded.target["test"], whole["test"]),
            score=self._scorer(tokenizer, encoded.references["valid"], self.decode == "always", 1, 0.0),
            test_score=self._scorer(
                tokenizer, encoded.references["test"], self.decode != "never", self.beam, self.length_penalty
            ),
            summarize=summarize,
            metric="bleu" if self.decode == "always" else "eval_loss",
            higher_is_better=self.decode == "always",
            facts=facts,
            files=tokenizer_files(encoded, config.tied == "all"),
        )

    def _to_train_on(self, encoded: Encoded) -> tuple[Tensor, dict[str, Any]]:
        """Which pairs are trained on, and what was counted."""
        lengths = torch.stack([encoded.source["train"].lengths, encoded.target["train"].lengths], dim=1)
        empty = (lengths == 0).any(dim=1)
        long = (lengths + 1 > self.max_length).any(dim=1) & ~empty
        chosen = (~empty & ~long).nonzero().squeeze(1)
        if not len(chosen):
            raise DataError(
                f"no pair of {self.data} is left to train on: {int(empty.sum())} have an empty line, {int(long.sum())} "
                f"a sentence of more than max_length={self.max_length} tokens"
            )
        facts = {
            "training_pairs": len(chosen),
            "training_pairs_with_an_empty_line": int(empty.sum()),
            "training_pairs_too_long": int(long.sum()),
        }
        for part in ("valid", "test"):
            lengths = torch.stack([encoded.source[part].lengths, encoded.target[part].lengths], dim=1)
            facts[f"{part}_pairs_with_an_empty_line"] = int((lengths == 0).any(dim=1).sum())
            facts[f"{part}_pairs_longer_than_in_training"] = int((lengths + 1 > self.max_length).any(dim=1).sum())
            if bool((lengths == 0).any(dim=1).all()):
                raise DataError(f"every pair of the {part} part of {self.data} has an empty line: nothing to measure")
        self._tell(facts)
        return chosen, facts

    def _tell(self, facts: dict[str, Any]) -> None:
        """Warn of pairs that are left out, or odd."""
        for name, what in (
            ("training_pairs_with_an_empty_line", "training pairs with an empty line are left out"),
            ("training_pairs_too_long", f"training pairs of more than {self.max_length} tokens are left out"),
            ("valid_pairs_with_an_empty_line", "pairs of validation have an empty line, and count"),
            ("test_pairs_with_an_empty_line", "pairs of the test have an empty line, and count"),
        ):
            if facts[name]:
                warn(f"{self.data}: {facts[name]:,} {what}")

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        source, target, _ = batch
        logits = model(source, target[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=self.label_smoothing)

    def _scorer(
        self, tokenizer: "Tokenizer", references: list[str], decodes: bool, beam: int, length_penalty: float
    ) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
        def score(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            source, target, rows = batch
            found = likelihood(model, source, target)
            if decodes:
                with self._without_compiling():
                    translations = translated(
                        model, source, self.model.target_vocab, beam, length_penalty, self.most_tokens
                    )
                texts = vocabulary.decode(tokenizer, translations)
                found |= bleu.counts(texts, [references[row] for row in rows.tolist()])
            return found

        return score

    def _without_compiling(self) -> AbstractContextManager[Any]:
        """Lengths change with every token: nothing would be compiled twice."""
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()


def weight(batch: Batch) -> Tensor:
    """Target tokens of a batch, ends included, ()."""
    return (batch[1][:, 1:] != PAD).sum()


def likelihood(model: nn.Module, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The negative log-likelihood of each target sentence, nats, and its tokens, ends included; each (B,)."""
    following = target[:, 1:]
    logits = model(source, target[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), ignore_index=PAD, reduction="none")
    return {"nll": losses.view_as(following).sum(-1), "tokens": (following != PAD).sum(-1)}


def translated(
    model: nn.Module, source: Tensor, vocab: int, beam: int, length_penalty: float, most: int = _MOST_TOKENS
) -> list[list[int]]:
    """Tokens of the translation of each sentence of (B, S).

    Each has at most half as many again as its source, and 10, and `most`: one line that is no sentence would else be
    waited for.
    """
    limits = (source != PAD).sum(-1)
    limits = (limits + limits // 2 + 10).clamp_max(most)
    together = max(1, _ROWS_TIMES_VOCABULARY // (beam * vocab))
    return [
        translation.tokens
        for part, most in zip(source.split(together), limits.split(together), strict=True)
        for translation in beam_search(model, part, most, beam, length_penalty, _in_any_process)
    ]


def summarize(means: dict[str, float], size: int) -> dict[str, float]:
    """BLEU and the loss of a whole set, from the means over its sentences."""
    metrics = {"eval_loss": means["nll"] / means["tokens"]}
    if bleu.COUNTS[0] in means:
        metrics["bleu"] = bleu.corpus_bleu({name: means[name] * size for name in bleu.COUNTS})
    return metrics


def tokenizer_files(encoded: Encoded, joint: bool) -> dict[str, str]:
    """The vocabularies as files of a run: one, or one for each language."""
    if joint:
        return {vocabulary.FILE: encoded.source_tokenizer}
    return {_SOURCE_FILE: encoded.source_tokenizer, _TARGET_FILE: encoded.target_tokenizer}


def tokenizers_of(files: Mapping[str, str]) -> tuple[str, str] | None:
    """The source's and the target's vocabulary among a run's files; None if they are not there."""
    joint = files.get(vocabulary.FILE)
    source, target = files.get(_SOURCE_FILE, joint), files.get(_TARGET_FILE, joint)
    return None if source is None or target is None else (source, target)


def _examples(source: Sentences, target: Sentences, chosen: Tensor) -> Examples:
    def batch(indices: Tensor, generator: torch.Generator) -> Batch:
        rows = chosen[indices]
        return source.batch(rows), target.batch(rows, begin=True), rows

    return Examples(len(chosen), batch, torch.stack([source.lengths, target.lengths], dim=1)[chosen] + 1)


def _in_any_process(mine: bool) -> bool:
    """Whether any process has sentences left: a forward may be one of all of them together."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return mine
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    told = torch.tensor(float(mine), device=device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return bool(told)
