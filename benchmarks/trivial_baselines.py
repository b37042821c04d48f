"""Each sequence task's small recipes against the trivial baseline of the task, and how long they take.

    python benchmarks/trivial_baselines.py                                   # all nine, one after the other
    python benchmarks/trivial_baselines.py --recipes speech-digits,gpt-shakespeare
    python benchmarks/trivial_baselines.py --seeds 3
    python benchmarks/trivial_baselines.py --quick                           # 2 steps each: does it run?

Baselines, on the same test part: translation, BLEU of copying the source; speech, word error rate of saying the most
frequent training transcript each time; language, nats a token of a trigram (interpolated Kneser-Ney, discounts tuned on
the validation text). Runs are not two at a time: their seconds are those of a machine that does nothing else. They
are kept, and earlier recipes stay in the table. Prints the test metric, the baseline's, by how much the recipe is
ahead (below zero: it is behind) and the minutes of the whole run, and writes results/trivial_baselines.json.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure

from trimtab.tasks.language import LanguageRecipe
from trimtab.tasks.language.ngram import nats_per_token
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import find_recipe
from trimtab.tasks.speech import SpeechRecipe
from trimtab.tasks.translation import TranslationRecipe
from trimtab.tasks.translation.bleu import corpus_bleu, counts
from trimtab.tasks.translation.pairs import find_corpus
from trimtab.train import train
from trimtab.train.hardware import Hardware

RECIPES = (
    "speech-digits", "speech-digits-sigma", "speech-an4", "speech-an4-sigma", "translate-multi30k",
    "translate-multi30k-sigma", "gpt-shakespeare", "translate-tatoeba", "gpt-wikitext2",
)  # fmt: skip
QUICK = {"steps": 2, "eval_every": 2, "watch_every": 2, "warmup_steps": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/trivial_baselines"))
    parser.add_argument("--quick", action="store_true", help="does it run? results/trivial_baselines_quick")
    arguments = parser.parse_args()
    name = "trivial_baselines" + "_quick" * arguments.quick
    folder = arguments.folder.with_name(arguments.folder.name + "_quick" * arguments.quick)
    rows: dict[str, dict[str, Any]] = {row["run"]: row for row in measure.read(name).get("rows", [])}
    for recipe_name in arguments.recipes.split(","):
        for seed in range(arguments.seeds):
            found = measured(recipe_name, seed, folder, quick=arguments.quick)
            rows[found["run"]] = found
            show(found)
    for found in rows.values():
        show(found)
    print(measure.write(name, {"rows": list(rows.values())}))


def measured(name: str, seed: int, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Train a recipe, and what its metric and its baseline's are on the test part."""
    recipe = replace(find_recipe(name), seed=seed, **(QUICK if quick else {}))
    if quick and isinstance(recipe, TranslationRecipe):
        recipe = replace(recipe, beam=1)  # what is untrained seldom ends a sentence
    place = folder / f"{name}-seed{seed}"
    result = train(recipe, place, hardware=Hardware(accelerator="cpu"), facts={"recipe_name": name})
    metric, baseline, worth = against(recipe, place)
    value = result.test.get(metric)
    ahead = None if value is None else (value - worth) * (1 if metric == "bleu" else -1)
    return {
        "run": f"{name} seed {seed}", "status": result.status, "steps": result.steps, "metric": metric, "value": value,
        "test": result.test, "baseline": baseline, "baseline_value": worth, "ahead": ahead, "seconds": result.seconds,
    }  # fmt: skip


def against(recipe: Recipe, place: Path) -> tuple[str, str, float]:
    """The name of the metric, of the baseline, and what that is worth on the test part."""
    match recipe:
        case TranslationRecipe():
            source, target = find_corpus(recipe.data, recipe.source, recipe.target).read()["test"]
            sums = {name: float(values.sum()) for name, values in counts(source, target).items()}
            return "bleu", "the source, copied", corpus_bleu(sums)
        case SpeechRecipe():
            facts = json.loads((place / "run.json").read_text(encoding="utf8"))
            return "wer", "the most frequent transcript", facts["most_frequent_transcript_wer"]["test"]
        case LanguageRecipe():
            return "eval_loss", "a trigram", nats_per_token(recipe.streams(), order=3)["test"]
    raise SystemExit(f"{type(recipe).__name__} has no trivial baseline here: translation, speech and language have")


def show(row: dict[str, Any]) -> None:
    value, worth, ahead = (
        "-" if row[key] is None else f"{row[key]:.3f}" for key in ("value", "baseline_value", "ahead")
    )
    print(
        f"{row['run']:32} {row['metric']:>9} {value:>7}  {row['baseline']}: {worth}  ahead {ahead:>6}  "
        f"{row['seconds'] / 60:.1f} minutes",
        flush=True,
    )


if __name__ == "__main__":
    main()
