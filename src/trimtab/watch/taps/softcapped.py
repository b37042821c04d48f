"""The tap on `trimtab.attention.softcap.softcapped_attention`: logits are measured as capped."""

from collections.abc import Callable
from typing import Any

from trimtab.attention.softcap import softcapped_attention
from trimtab.watch.signals import HeadStats, head_stats
from trimtab.watch.taps.backend import BackEnd, Call, as_attention_sees


def functions() -> list[Callable[..., Any]]:
    """The functions whose calls are measured."""
    return [softcapped_attention]


def _measure(call: Call) -> HeadStats:
    given = call.arguments()
    options = {name: given[name] for name in ("softcap", "attn_mask", "is_causal", "scale", "enable_gqa")}
    return head_stats(as_attention_sees(given["query"]), as_attention_sees(given["key"]), **options)


BACK_END = BackEnd("soft-capped attention", _measure)
