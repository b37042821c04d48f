import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trimtab.cli import main
from trimtab.models.gpt import GPT, GPTConfig
from trimtab.tasks.language import LanguageRecipe
from trimtab.tasks.text.tokens import Kind
from trimtab.train import Hardware, train
from trimtab.use.generate import GenerateOptions, generate_text

TEXT = "one two four five six ten\n" * 400


def trained(folder: Path, kind: Kind, **changes: object) -> Path:
    """A run that has learned to count."""
    (folder / "text.txt").write_text(TEXT)
    model = GPTConfig(280 if kind == "bpe" else None, context=24, dim=32, depth=1, num_heads=2)
    recipe = LanguageRecipe(
        data=str(folder / "text.txt"), tokens=kind, model=model, lr=1e-2, batch_size=16, steps=100, watch=False,
        watch_every=50, eval_every=100,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        train(replace(recipe, **changes), folder / "run", hardware=Hardware(accelerator="cpu"))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("characters"), "characters")


def said(run: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main(["generate", str(run), *words]) == 0
    return capsys.readouterr()


def test_a_model_goes_on_with_what_it_learned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, notes = said(run, "--prompt", "one two fo", "--count", "60", "--temperature", "0", capsys=capsys)
    assert out == (TEXT[:70] + "\n")
    assert notes == ""


def test_a_seed_draws_one_text_whatever_torchs_own_generator(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--count", "80", "--temperature", "2", "--top-k", "3")
    texts = []
    for seed in ("1", "1", "2"):
        torch.rand(3)
        texts.append(said(run, *options, "--seed", seed, capsys=capsys)[0])
    assert texts[0] == texts[1] != texts[2]
    assert all(len(text) == 81 for text in texts)


def test_an_empty_prompt_begins_a_line(run: Path) -> None:
    assert generate_text(GenerateOptions(run, count=9, temperature=0)) == "one two f"
    assert generate_text(GenerateOptions(run, count=0)) == ""


def test_what_the_model_cannot_read_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, notes = said(run, "--prompt", "Zéro one", "--count", "4", capsys=capsys)
    assert out.startswith("Zéro one")
    assert notes == "note: the model knows no 'Z', 'é', which it reads as <unk>\n"
    _, notes = said(run, "--prompt", "<pad><s><eos>one", "--count", "1", capsys=capsys)
    assert notes == ""  # these tokens are read as what they are
    _, notes = said(run, "--prompt", "one two four five six ten one", "--count", "0", capsys=capsys)
    assert notes == "note: the model reads the last 24 of the prompt's 29 tokens\n"


def test_words_have_spaces_between_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, "words")
    assert said(run, "--prompt", "one<eos>two", "--count", "0", capsys=capsys)[1] == ""
    for prompt, expected in (("one two", " four five"), ("six ten", "\none"), ("", "one two"), ("ten\n", "one two")):
        found = generate_text(GenerateOptions(run, prompt, count=2, temperature=0))
        assert found == prompt + expected


def test_stabilizers_and_averages_are_in_the_weights(tmp_path: Path) -> None:
    run = trained(tmp_path, "bpe", stabilizer="sigma+qk-norm", ema=0.5)
    assert generate_text(GenerateOptions(run, "one two", count=10, temperature=0)).startswith("one two four five")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", "-1"), "--temperature must be at least 0 and finite, got -1"),
        (("--top-k", "0"), "--top-k must be at least 1, got 0"),
        (("--count", "-3"), "--count must be at least 0, got -3"),
        (("--tempo", "1"), "unknown field --tempo"),
        (("--seed", str(2**64)), "--seed must be a whole number of 64 bits, got 18446744073709551616"),
        (("--prompt", "bad\udcff"), "--prompt is no UTF-8 text"),
    ],
)
def test_options_out_of_range_are_refused(
    tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_other_folders_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path)]) == 2
    assert "is no run folder that can be read" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "files" / "tokenizer.json").unlink()
    assert main(["generate", str(copy)]) == 2
    assert "lacks its vocabulary, files/tokenizer.json: copy the whole run folder" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_told_without_a_traceback(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: GPT, *arguments: object) -> torch.Tensor:
        return torch.full((1, 1, self.config.vocab_size or 1), torch.nan)

    monkeypatch.setattr(GPT, "forward", broken)
    assert main(["generate", str(run)]) == 2
    assert "the model's logits are not finite" in capsys.readouterr().err
