"""Recipes for translation: functions that return a typed, frozen config.

`translate-multi30k` and `translate-tatoeba` train on two cores in minutes; the numbers are our own. `*-sigma` is what
the paper of sigma-Reparam (Zhai et al., arXiv 2303.06296) trains: post-LN without warmup. `translate-wmt17*` are for
GPUs: 50,000 tokens a step, shared by `accumulate` micro-batches and all processes.
"""

from collections.abc import Callable
from dataclasses import replace

from trimtab.models.encoder_decoder import EncoderDecoderConfig
from trimtab.tasks.translation.translation_recipe import TranslationRecipe

SIGMA = "sigma:gamma_init=one"


def translate_multi30k() -> TranslationRecipe:
    """English to German, captions of Multi30k, in minutes: pre-LN, Adam, warmup, cosine.

    1.9 million parameters, 4,000 byte pairs.
    """
    return TranslationRecipe(
        data="multi30k",
        source="en",
        target="de",
        model=EncoderDecoderConfig(
            source_vocab=4000,
            target_vocab=4000,
            dim=128,
            encoder_depth=3,
            decoder_depth=3,
            num_heads=4,
            norm="pre",
        ),
        optimizer="adam",
        betas=(0.9, 0.98),
        lr=3e-3,
        schedule="cosine",
        warmup_steps=200,
        steps=2000,
        batch_tokens=2048,
        watch_every=50,
        eval_every=1000,
    )


def translate_multi30k_sigma() -> TranslationRecipe:
    """English to German, Multi30k, sigma-Reparam with post-LN, without warmup: Adam."""
    return _sigma(translate_multi30k())


def translate_tatoeba() -> TranslationRecipe:
    """English to German, short sentences of Tatoeba, in minutes: pre-LN, Adam, warmup, cosine.

    1.9 million parameters, 4,000 byte pairs; no English sentence is in two parts.
    """
    return replace(translate_multi30k(), data="tatoeba-deu-eng", steps=4000)


def translate_wmt17() -> TranslationRecipe:
    """English to German, WMT'17 in a folder of your own, for GPUs: post-LN, Adam, warmup.

    61 million parameters ("base" of Vaswani et al.): 6 + 6 blocks. The folder wmt17-en-de holds train, valid and test
    as .en and .de.
    """
    return TranslationRecipe(
        data="wmt17-en-de",
        source="en",
        target="de",
        model=EncoderDecoderConfig(
            source_vocab=32_000,
            target_vocab=32_000,
            dim=512,
            encoder_depth=6,
            decoder_depth=6,
            num_heads=8,
            norm="post",
        ),
        max_length=256,
        optimizer="adam",
        betas=(0.9, 0.98),
        lr=7e-4,
        schedule="inverse_sqrt",
        warmup_steps=4000,
        steps=100_000,
        batch_tokens=50_000,
        precision="bf16",
        watch_every=100,
        eval_every=5000,
        checkpoint_every=5000,
    )


def translate_wmt17_sigma() -> TranslationRecipe:
    """English to German, WMT'17, sigma-Reparam with post-LN, without warmup, for GPUs: Adam."""
    return _sigma(translate_wmt17())


def translate_wmt17_sigma_deep() -> TranslationRecipe:
    """English to German, WMT'17, 100 + 100 blocks, sigma-Reparam, post-LN, for GPUs: Adam."""
    base = translate_wmt17_sigma()
    return replace(base, model=replace(base.model, encoder_depth=100, decoder_depth=100), accumulate=4)


def _sigma(recipe: TranslationRecipe) -> TranslationRecipe:
    return replace(
        recipe,
        model=replace(recipe.model, norm="post"),
        stabilizer=SIGMA,
        schedule="cosine",
        warmup_steps=0,
    )


TRANSLATION_RECIPES: dict[str, Callable[[], TranslationRecipe]] = {
    "translate-multi30k": translate_multi30k,
    "translate-multi30k-sigma": translate_multi30k_sigma,
    "translate-tatoeba": translate_tatoeba,
    "translate-wmt17": translate_wmt17,
    "translate-wmt17-sigma": translate_wmt17_sigma,
    "translate-wmt17-sigma-deep": translate_wmt17_sigma_deep,
}
"""Name to the function that returns the recipe."""
