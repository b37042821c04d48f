"""docs/stabilizers.md knows every stabilizer with its options, and its code runs."""

import pydoc
import re
from pathlib import Path

from stabilizer_case import TRIMTABS

from trimtab.stabilizers import STABILIZERS
from trimtab.stabilizers.options import described

PAGE = (Path(__file__).parents[2] / "docs" / "stabilizers.md").read_text(encoding="utf-8")


def option_rows() -> list[str]:
    """What the page's table of options has to say, in the order of its first table."""
    names = re.findall(r"^\| `([a-z-]+)` \|", PAGE.split("## Options")[0], re.MULTILINE)
    options = [(name, *pair) for name in names for pair in described(STABILIZERS[name]).items()]
    return [f"| `{name}` | `{option}` | {values} |" for name, option, values in options]


def test_every_stabilizer_is_named_once() -> None:
    named = re.findall(r"^\| `([a-z-]+)` \|", PAGE.split("## Options")[0], re.MULTILINE)
    assert sorted(named) == sorted(TRIMTABS)


def test_every_option_is_told() -> None:
    table = re.findall(r"^\| `[a-z-]+` \| `.*$", PAGE.split("## Options")[1], re.MULTILINE)
    assert table == option_rows()


def test_what_is_named_exists() -> None:
    names = re.findall(r"\b(?:trimtab|tt)(?:\.\w+)+", PAGE)
    assert names
    for name in names:
        assert pydoc.locate(re.sub(r"^tt\.", "trimtab.", name)) is not None, name


def test_the_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 7
    try:
        exec("\n".join(blocks), {"__name__": "page"})
    finally:
        STABILIZERS.pop("small-head", None)
