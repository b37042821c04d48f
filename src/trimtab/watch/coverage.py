"""What attention of a model was seen, what was not, and why."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from trimtab.attention.low_rank import LowRankFused
from trimtab.watch.signals import HeadStats, merge

ROOT = "(root)"

# Children or parameters, by name, that say a module makes queries and keys. Each line is one habit.
_PROJECTIONS = (
    {"q_proj", "k_proj"},
    {"query", "key"},
    {"to_q", "to_k"},
    {"wq", "wk"},
    {"w_q", "w_k"},
    {"q", "k", "v"},
    {"q_lin", "k_lin"},
    {"qkv"},
    {"qkv_proj"},
    {"c_attn"},
    {"in_proj_weight"},
)


@dataclass(frozen=True)
class Row:
    """The attention of one module.

    Attributes:
        module: its dotted name; ``name#2`` is its second call in one forward.
        back_end: how it computes attention; empty where that is not known.
        seen: "exact" or "not seen".
        why: why it was not seen, or what to know about the numbers.
        heads: how many heads were measured; 0 where none was.
    """

    module: str
    back_end: str
    seen: str
    why: str = ""
    heads: int = 0


@dataclass(frozen=True)
class Coverage:
    """A row for every module that calls attention or looks as if it did. ``print`` it."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def unseen(self) -> dict[str, str]:
        """Why, by module name, of the attention that was not seen."""
        return {row.module: row.why for row in self.rows if row.seen == "not seen"}

    def __str__(self) -> str:
        if not self.rows:
            return "no attention was seen, and no module of the model looks like attention"
        head = ("module", "heads", "attention by", "seen", "")
        table = [head, *((r.module, str(r.heads or ""), r.back_end, r.seen, r.why) for r in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(head) - 1)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
            for line in table
        )


@dataclass
class Seen:
    """What the forwards of a model have shown so far.

    Attributes:
        stats: every call's statistics, by module name, since they were last taken.
        rows: the latest about each module that called attention.
        ran: the names of the modules that have run.
        hints: why what a module returned was not taken for attention weights.
        told: the names of the modules in which the program told of attention itself.
    """

    stats: dict[str, list[HeadStats]] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    hints: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def add(self, name: str, back_end: str, stats: HeadStats, note: str) -> None:
        """A call was measured."""
        self.stats.setdefault(name, []).append(stats)
        self.rows[name] = Row(name, back_end, "exact", note, len(stats.entropy))

    def miss(self, name: str, back_end: str, why: str) -> None:
        """A call could not be measured."""
        self.rows[name] = Row(name, back_end, "not seen", why)

    def merged(self) -> dict[str, HeadStats]:
        """One `HeadStats` a module; of one whose number of heads changes, those with the number it began with."""
        return {
            name: merge([stats for stats in found if len(stats.entropy) == len(found[0].entropy)])
            for name, found in self.stats.items()
        }

    def take_in(self, other: "Seen") -> None:
        """What another forward has shown."""
        for name, stats in other.stats.items():
            self.stats.setdefault(name, []).extend(stats)
        self.rows.update(other.rows)
        self.ran.update(other.ran)
        self.told.update(other.told)
        self.hints.update(other.hints)

    def coverage(self, model: nn.Module, names: dict[int, str], trouble: str = "") -> Coverage:
        """The rows of what was seen, then of what looks like attention and was not.

        Args:
            model: the model.
            names: of its modules, by id.
            trouble: why a whole forward could not be seen, if so.
        """
        called = {*(name.split("#")[0] for name in self.rows), *self.told}
        rows = list(self.rows.values())
        for name in _candidates(model, names):
            if not any(_within(other, name) for other in called):
                why = trouble or self.hints.get(name) or _guess(name in self.ran)
                rows.append(Row(name, "", "not seen", why))
        if trouble and not rows:
            rows.append(Row(ROOT, "", "not seen", trouble))
        return Coverage(tuple(rows))


def _guess(ran: bool) -> str:
    if ran:
        return "it ran, but called no attention that a tap knows; call watch.attention(query, key) in it"
    return "it has not run in a forward that was looked at, or not by being called as a module"


def _candidates(model: nn.Module, names: dict[int, str]) -> list[str]:
    """The innermost modules that look like attention."""
    found = list(dict.fromkeys(names[id(module)] for module in model.modules() if _looks_like_attention(module)))
    return [name for name in found if not any(other != name and _within(other, name) for other in found)]


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, LowRankFused):  # a layer of the attention that holds it
        return False
    own = {name for name, _ in module.named_children()} | {name for name, _ in module.named_parameters(recurse=False)}
    return "attention" in type(module).__name__.lower() or any(names <= own for names in _PROJECTIONS)


def _within(name: str, outer: str) -> bool:
    return name == outer or outer == ROOT or name.startswith(f"{outer}.")
