"""How far the report's intervals and its test can be trusted with few seeds, on numbers whose truth is known.

    python benchmarks/seed_statistics.py    # half a minute

Every trial draws one normal number a seed for each of two equal arms, with part of the noise in common, as a seed has.
Printed: how often the 95 % interval of an arm's mean covers the truth, and how often the test tells the two arms apart
although they are equal (at most 5 % is wanted).
"""

import argparse

import measure
import numpy as np

from trimtab.report.differences import differences, interval, resamples

SEEDS = (3, 5, 10)


def trial(random: np.random.Generator, num_seeds: int) -> tuple[bool, bool]:
    """Whether the interval covers 0, and whether the equal arms are told apart."""
    common = random.standard_normal(num_seeds)
    arms = {name: common + random.standard_normal(num_seeds) for name in ("first", "second")}
    draws = {name: values[resamples(num_seeds)].mean(axis=1) for name, values in arms.items()}
    low, high = interval(draws["first"], num_seeds)
    means = {name: float(values.mean()) for name, values in arms.items()}
    (found,) = differences(means, draws, num_seeds)
    return low <= 0 <= high, found.told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    trials = parser.parse_args().trials
    rows = {}
    print("seeds  interval covers the truth  equal arms told apart")
    for num_seeds in SEEDS:
        random = np.random.default_rng(num_seeds)
        covers, told = np.mean([trial(random, num_seeds) for _ in range(trials)], axis=0)
        rows[num_seeds] = {"covers": float(covers), "told": float(told)}
        print(f"{num_seeds:5}  {covers:25.1%}  {told:21.1%}")
    print(f"written to {measure.write('seed_statistics', {'trials': trials, 'seeds': rows})}")


if __name__ == "__main__":
    main()
