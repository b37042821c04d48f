"""Tokens that a trained `GPT` goes on with."""

import torch
from torch import Tensor

from trimtab.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    count: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the tokens that follow, one after the other.

    Each costs one forward of one token, since keys and values of the earlier ones are kept. Where the context is full,
    the older half of it is forgotten, and the rest is read anew.

    Args:
        model: in eval mode.
        tokens: what they follow, (B, T) int64, at least one; of more than the context the last are read.
        count: how many.
        temperature: by which the logits are divided; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens are drawn from; None for all.
        generator: draws them, on the model's device; None for torch's global one.

    Returns:
        (B, count), int64.

    Raises:
        ValueError: there are no tokens to follow, an argument is out of range, or the model's logits are not finite.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"expected tokens of shape (B, T), T at least 1; got {tuple(tokens.shape)}")
    if count < 0 or not 0 <= temperature < float("inf") or (top_k is not None and top_k < 1):
        raise ValueError(
            "expected count >= 0, a finite temperature >= 0 and top_k >= 1 or None; got "
            f"{count}, {temperature} and {top_k}"
        )
    context, given = model.config.context, tokens.shape[1]
    cache, new = model.empty_cache(), tokens[:, -context:]
    for _ in range(count):
        if cache[0] and cache[0][0].shape[2] == context:
            cache, new = model.empty_cache(), tokens[:, -max(1, context // 2) :]
        logits = model(new, cache)[:, -1].float()
        if not bool(logits.isfinite().all()):
            raise ValueError("the model's logits are not finite, so no token can be drawn: take an earlier checkpoint")
        drawn = _draw(logits, temperature, top_k, generator)  # (B, V) -> (B, 1)
        tokens, new = torch.cat([tokens, drawn], dim=1), drawn
    return tokens[:, given:]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits: (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        values, likeliest = logits.topk(min(top_k, logits.shape[-1]))  # of equal ones no more than that
        logits = torch.full_like(logits, -torch.inf).scatter(-1, likeliest, values)
    below = logits - logits.amax(dim=-1, keepdim=True)  # so that none but -inf comes of a temperature near 0
    smallest = torch.finfo(logits.dtype).tiny
    return torch.multinomial((below / max(temperature, smallest)).softmax(dim=-1), 1, generator=generator)
