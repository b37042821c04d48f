"""A conversion in words: what was converted, what was left, and why."""

from torch import Tensor, nn

from trimtab.reparam.convert import expect_module
from trimtab.reparam.layers import Reparametrized
from trimtab.reparam.norms import is_norm
from trimtab.reparam.plan import is_zero
from trimtab.reparam.sigmas import sigma_gamma

# Values listed one by one; more blocks are shown by the range of theirs.
_MOST_SHOWN = 4


def describe(model: nn.Module) -> str:
    """Return a table of every parameter matrix or layer of a model: converted or left, and why.

    Args:
        model: converted or not.

    Returns:
        Lines of text: dotted name, class, shape, and either sigma and gamma or the reason why it was left alone.

    Raises:
        TypeError: if the model is not a module.
    """
    expect_module(model)
    values = sigma_gamma(model)
    holders: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{module_name}.{name}".lstrip("."))
    rows: list[tuple[str, str, str, str]] = []
    for module_name, module in model.named_modules():
        carried = set(module._carried_sizes) if isinstance(module, Reparametrized) else set()
        for name, parameter in module._parameters.items():
            key = f"{module_name}.{name}".lstrip(".")
            if parameter is None or (name.endswith("gamma") and carried):
                continue
            if name in carried:
                note = _converted(*values[key]) if key in values else "converted: sigma not known on the meta device"
            elif parameter.ndim < 2:
                continue  # biases and norm gains hold no matrix
            else:
                others = [other for other in holders[id(parameter)] if other != key]
                note = "left: " + _why(module, parameter, others)
            rows.append((key, type(module).__name__, "x".join(map(str, parameter.shape)), note))
    converted = sum(note.startswith("converted") for *_, note in rows)
    counts = f"{converted} of {len(rows)} weights converted"
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    return "\n".join([counts, *lines])


def _converted(sigma: Tensor, gamma: Tensor) -> str:
    blocks = f" in {len(sigma)} blocks" if len(sigma) > 1 else ""
    return f"converted{blocks}: sigma {_in_short(sigma)}, gamma {_in_short(gamma)}"


def _in_short(values: Tensor) -> str:
    if len(values) > _MOST_SHOWN:
        return f"{float(values.min()):.4g} to {float(values.max()):.4g}"
    return ", ".join(f"{value:.4g}" for value in values.tolist())


def _why(module: nn.Module, parameter: nn.Parameter, others: list[str]) -> str:
    if others:
        return f"shares its weight with {', '.join(others)}"
    if is_norm(module):
        return "a norm layer holds no matrix"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding is read row by row; SigmaReparam(embeddings=True) offers nn.Embedding too"
    if is_zero(parameter):
        return "it is zero, so it has no direction to normalise"
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention):
        return "not chosen"
    return "not a layer that is converted"
