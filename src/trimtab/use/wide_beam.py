"""What is said of a search so wide that it looks like a standstill."""

import sys

_USUAL, _WIDE = 5, 100


def tell_of_wide_beam(beam: int) -> None:
    """Say on stderr how long a search of more than 100 hypotheses may take."""
    if beam > _WIDE:
        print(f"note: a beam of {beam:,} may take {beam // _USUAL:,} times as long as one of {_USUAL}", file=sys.stderr)
