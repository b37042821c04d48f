"""Recipes for language: functions that return a typed, frozen config."""

from collections.abc import Callable
from dataclasses import replace

from trimtab.models.gpt import GPTConfig
from trimtab.tasks.language.language_recipe import LanguageRecipe


def gpt_shakespeare() -> LanguageRecipe:
    """A small GPT on the characters of Tiny Shakespeare, in minutes: pre-LN, AdamW, cosine.

    0.8 million parameters. The validation text is the last tenth's first half, the test text its second.
    """
    return LanguageRecipe(
        data="tinyshakespeare",
        tokens="characters",
        model=GPTConfig(None, context=128, dim=128, depth=4, num_heads=4, residual_gain=8**-0.5),
        lr=3e-3,
        schedule="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        clip=1.0,
        batch_size=16,
        steps=2000,
        watch_every=50,
        eval_every=500,
    )


def gpt_wikitext2() -> LanguageRecipe:
    """A small GPT on the words of WikiText-2: pre-LN, AdamW, cosine.

    33,278 types of words, those of its training text. 5 million parameters, most of them the embedding, tied.
    """
    return LanguageRecipe(
        data="wikitext-2",
        tokens="words",
        model=GPTConfig(None, context=64, dim=128, depth=4, num_heads=4, dropout=0.2, residual_gain=8**-0.5),
        lr=3e-3,
        schedule="cosine",
        warmup_steps=200,
        weight_decay=0.1,
        clip=1.0,
        batch_size=16,
        steps=6000,
        watch_every=50,
        eval_every=1000,
        evaluation_tokens=20_000,
    )


def gpt_wikitext2_bpe() -> LanguageRecipe:
    """A small GPT on byte pairs of WikiText-2: pre-LN, AdamW, cosine."""
    recipe = gpt_wikitext2()
    return replace(recipe, tokens="bpe", model=replace(recipe.model, vocab_size=4096, context=128))


def gpt_wikitext103() -> LanguageRecipe:
    """GPT-2's smallest size on byte pairs of WikiText-103, for GPUs: pre-LN, AdamW.

    Settings of GPT-2's size and ours, not tuned. The data folder must hold wikitext-103.
    """
    return LanguageRecipe(
        data="wikitext-103",
        tokens="bpe",
        model=GPTConfig(
            vocab_size=32_768, context=512, dim=768, depth=12, num_heads=12, dropout=0.1, residual_gain=24**-0.5
        ),
        lr=6e-4,
        betas=(0.9, 0.95),
        schedule="cosine",
        warmup_steps=2000,
        weight_decay=0.1,
        clip=1.0,
        precision="bf16",
        compile=True,
        batch_size=128,
        accumulate=4,
        steps=40_000,
        watch_every=100,
        eval_every=2000,
        stride=256,
        evaluation_tokens=100_000,
    )


def gpt_wikitext103_sigma() -> LanguageRecipe:
    """WikiText-103 on GPUs with sigma-Reparam in place of LayerNorm, no warmup.

    The head is a weight of its own, which sigma-Reparam has too, and the embeddings start larger: no norm lifts them.
    """
    recipe = gpt_wikitext103()
    model = replace(recipe.model, norm="none", tied=False, embedding_std=0.5, position_std=0.5)
    return replace(recipe, stabilizer="sigma:gamma_init=one", model=model, warmup_steps=0)


LANGUAGE_RECIPES: dict[str, Callable[[], LanguageRecipe]] = {
    "gpt-shakespeare": gpt_shakespeare,
    "gpt-wikitext2": gpt_wikitext2,
    "gpt-wikitext2-bpe": gpt_wikitext2_bpe,
    "gpt-wikitext103": gpt_wikitext103,
    "gpt-wikitext103-sigma": gpt_wikitext103_sigma,
}
"""Name to the function that returns the recipe."""
