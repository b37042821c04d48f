"""What is measured of a batch, and the metrics that it makes over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trimtab.tasks.speech.batches import SpeechBatch
from trimtab.tasks.speech.ctc import ctc_loss, frames_needed
from trimtab.tasks.speech.decode import Beam, transcribe
from trimtab.tasks.speech.labels import Labels
from trimtab.tasks.speech.metrics import Edits, edits
from trimtab.tasks.speech.ngram import NGram


def scores(
    model: nn.Module,
    batch: SpeechBatch,
    texts: Sequence[str],
    labels: Labels,
    beam: Beam = Beam(),  # noqa: B008 - it is frozen
    ngram: NGram | None = None,
) -> dict[str, Tensor]:
    """What the metrics are ratios of: for each utterance nats, characters, words, and errors, each (B,).

    A transcript that is too long for CTC has no finite loss: its nats and `loss_characters` are 0, so that the loss is
    that of the others. Its errors count.
    """
    logits, lengths = model(batch.features, batch.lengths)
    nats = ctc_loss(logits, lengths, batch.targets, batch.target_lengths)
    impossible = torch.tensor(
        [
            frames_needed(row[:count].tolist()) > frames
            for row, count, frames in zip(
                batch.targets.cpu(), batch.target_lengths.tolist(), lengths.tolist(), strict=True
            )
        ],
        device=nats.device,
    )
    found = {
        "nats": nats.masked_fill(impossible, 0),
        "loss_characters": batch.target_lengths.masked_fill(impossible, 0),
    }
    references = [texts[i] for i in batch.indices.tolist()]

    def compare(beam: Beam, ngram: NGram | None) -> dict[str, Tensor]:
        heard = transcribe(logits, lengths, labels, beam, ngram)
        each = [edits(*pair) for pair in zip(references, heard, strict=True)]
        return dict(zip(Edits._fields, torch.tensor(each, device=nats.device).unbind(1), strict=True))

    found |= compare(Beam(), None)
    if beam.width > 1:
        found |= {f"beam_{name}": value for name, value in compare(beam, ngram).items() if name.endswith("errors")}
    return found


def summarize(means: dict[str, float], size: int) -> dict[str, float]:
    """The metrics: ratios of what `scores` gives."""
    metrics = {
        "wer": means["word_errors"] / means["words"],
        "cer": means["character_errors"] / means["characters"],
        "eval_loss": means["nats"] / means["loss_characters"] if means["loss_characters"] else float("nan"),
    }
    if "beam_word_errors" in means:
        metrics["beam_wer"] = means["beam_word_errors"] / means["words"]
        metrics["beam_cer"] = means["beam_character_errors"] / means["characters"]
    return metrics
