"""BLEU of copying the source: the least that a translation recipe has to beat.

    python benchmarks/copying.py

Prints sacrebleu's BLEU of the test part's source sentences against their translations, with its signature, and writes
results/copying.json.
"""

import measure

from trimtab.tasks.translation.bleu import corpus_bleu, counts, signature
from trimtab.tasks.translation.pairs import find_corpus

DATA = ("multi30k", "tatoeba-deu-eng")


def main() -> None:
    rows = {}
    for data in DATA:
        source, target = find_corpus(data, "en", "de").read()["test"]
        sums = {name: float(values.sum()) for name, values in counts(source, target).items()}
        rows[f"{data} en-de"] = bleu = corpus_bleu(sums)
        print(f"{data:16} en-de  {bleu:.2f}  {signature()}")
    print(measure.write("copying", {"signature": signature(), "rows": rows}))


if __name__ == "__main__":
    main()
