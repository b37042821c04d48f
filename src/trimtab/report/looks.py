"""One look for each arm: colours that the colour-blind can tell apart, and marks and dashes that all can."""

from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's, without black (dark pages) and yellow (light pages); the baseline is grey.
_BASELINE = "#7d8590"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "star")
_DASHES = ("solid", "dash", "dot", "dashdot")
_SIGNS = {"circle": "●", "diamond": "◆", "square": "■", "triangle-up": "▲", "triangle-down": "▼", "star": "★"}


@dataclass(frozen=True)
class Look:
    """How an arm is drawn.

    Attributes:
        color: as #rrggbb.
        symbol: plotly's name of the mark.
        dash: plotly's name of the dash.
    """

    color: str
    symbol: str
    dash: str

    @property
    def sign(self) -> str:
        """The mark as a letter."""
        return _SIGNS[self.symbol]

    def faded(self, opacity: float) -> str:
        """The colour, seen through."""
        red, green, blue = (int(self.color[start : start + 2], 16) for start in (1, 3, 5))
        return f"rgba({red},{green},{blue},{opacity:g})"


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """A look for every arm, by its place; the first one is the baseline."""
    found = {}
    for place, arm in enumerate(arms):
        turn, color = divmod(place - 1, len(_COLORS))
        look = Look(_COLORS[color], _SYMBOLS[(place - 1) % len(_SYMBOLS)], _DASHES[turn % len(_DASHES)])
        found[arm] = look if place else Look(_BASELINE, "circle", "solid")
    return found
