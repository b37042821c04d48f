"""What n-grams make of the texts of the language recipes: the baseline that a GPT has to beat.

    python benchmarks/ngrams.py            # minutes
    python benchmarks/ngrams.py --quick    # bigrams of Tiny Shakespeare: does it run?

Interpolated Kneser-Ney, discounts tuned on the validation text. Prints nats a token of validation and test text, and
writes results/ngrams.json.
"""

import argparse

import measure

from trimtab.tasks.language.ngram import nats_per_token
from trimtab.tasks.language.recipes import gpt_shakespeare, gpt_wikitext2, gpt_wikitext2_bpe

ORDERS = {gpt_shakespeare: (2, 3, 4, 5, 6), gpt_wikitext2: (2, 3, 4), gpt_wikitext2_bpe: (3,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    chosen = {gpt_shakespeare: (2,)} if arguments.quick else ORDERS
    rows = {}
    for recipe, orders in chosen.items():
        streams = recipe().streams()
        for order in orders:
            rows[f"{recipe.__name__} {order}-gram"] = found = nats_per_token(streams, order=order)
            print(f"{recipe.__name__:20} {order}-gram  validation {found['validation']:.3f}  test {found['test']:.3f}")
    print(measure.write("ngrams_quick" if arguments.quick else "ngrams", {"rows": rows}))


if __name__ == "__main__":
    main()
