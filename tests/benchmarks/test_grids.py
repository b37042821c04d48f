"""What the benchmarks that train grids share."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_results_of_a_gpu_have_a_name_of_their_own(bench: Callable[[str], ModuleType]) -> None:
    grids = bench("grids")
    parser = grids.options("doc", gpu=True)
    for words, name, accelerator in (
        ("", "speech", "cpu"),
        ("--gpu", "speech_gpu", "auto"),
        ("--gpu --quick", "speech_gpu_quick", "auto"),
    ):
        arguments = parser.parse_args(words.split())
        assert grids.place("speech", arguments) == (name, Path("runs") / name)
        assert grids.hardware(arguments).accelerator == accelerator
    plain = grids.options("doc")
    assert grids.place("toy", plain.parse_args(["--folder", "x"])) == ("toy", Path("x"))
    with pytest.raises(SystemExit):
        plain.parse_args(["--gpu"])


@pytest.mark.parametrize("data", ["digits", "an4"])
def test_speech_on_a_gpu_differs_in_size_and_budget_alone(bench: Callable[[str], ModuleType], data: str) -> None:
    speech = bench("speech")
    small, large = (speech.arms(data, None, gpu=gpu, quick=False) for gpu in (False, True))
    for kind in speech.LRS:
        assert list(small[kind]) == list(large[kind])
        for arm, recipe in large[kind].items():
            before = small[kind][arm]
            assert recipe.steps == speech.GPU_STEPS * before.steps
            assert recipe.model.dim > before.model.dim
            assert (recipe.stabilizer, recipe.model.norm) == (before.stabilizer, before.model.norm)
            assert (recipe.warmup_steps == 0) == (before.warmup_steps == 0)
    deeper = speech.arms(data, 5, gpu=True, quick=True)["adam"]["post-LN"]
    assert (deeper.model.depth, deeper.model.dim) == (5, large["adam"]["post-LN"].model.dim)
