"""How many attention heads a checkpoint's model has, from what lies beside its tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.inspect.names import Heads
from trimtab.reparam.blocks import HEADS, KEY_HEADS

# Where a configuration keeps its arguments, besides at the top.
_INSIDE = ("model_args", "config", "args", "hparams", "hyper_parameters", "recipe", "model", "model_config")


def find_heads(num_heads: int | None, num_kv_heads: int | None, path: Path, facts: Mapping[str, Any]) -> Heads | None:
    """Return the numbers of heads: as asked for, or as a configuration has them, else None.

    Args:
        num_heads: what the user says, if anything.
        num_kv_heads: what the user says, if anything.
        path: of the checkpoint; config.json is looked for beside it, run.json of a run folder above it.
        facts: what was saved with the tensors.
    """
    folder = path if path.is_dir() else path.parent
    # A run folder's checkpoints lie two folders below its run.json.
    files = (folder / "config.json", *(above / "run.json" for above in (folder, *folder.parents[:2])))
    told = next((found for found in (_told(facts), *map(_told_in, files)) if found), None)
    model_type = told.model_type if told else ""
    if num_heads:
        return Heads(num_heads, num_kv_heads or num_heads, model_type)
    return told


def _told_in(file: Path) -> Heads | None:
    try:
        return _told(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _told(content: Any, depth: int = 3) -> Heads | None:
    fields = content if isinstance(content, Mapping) else getattr(content, "__dict__", {})
    heads = _first(fields, HEADS)
    if heads is None and fields.get("encoder_attention_heads") == fields.get("decoder_attention_heads"):
        heads = _first(fields, ("encoder_attention_heads",))
    if heads:
        one = fields.get("multi_query") is True and not fields.get("new_decoder_architecture")  # Falcon's two kinds
        key_heads = 1 if one else _first(fields, KEY_HEADS) or heads
        if heads % key_heads == 0:
            return Heads(heads, key_heads, str(fields.get("model_type") or ""))
    if depth:
        inner = (_told(fields[name], depth - 1) for name in _INSIDE if name in fields)
        return next((found for found in inner if found), None)
    return None


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (fields.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
