"""`trimtab translate`: one line for each line, those of the run's own model."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from translation_corpus import sentences, small_recipe, write_folder

from trimtab.cli import main
from trimtab.tasks.images import vit_digits
from trimtab.tasks.text.tokens import decode
from trimtab.tasks.translation import TranslationRecipe
from trimtab.tasks.translation.sentences import plain_tokenizer
from trimtab.tasks.translation.translation_recipe import translated
from trimtab.train import Hardware, train
from trimtab.train.trained import load_trained, open_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose loss has fallen; its translations are those of a beginner."""
    folder = tmp_path_factory.mktemp("translate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        recipe = small_recipe(write_folder(folder / "own"), decode="never", stabilizer="sigma", steps=40)
        recipe = replace(recipe, watch_every=40, eval_every=40, max_length=20)
        facts = {"recipe_name": "translate-multi30k"}
        train(recipe, folder / "run", hardware=Hardware(accelerator="cpu"), facts=facts)
    return folder / "run"


def expected(run: Path, lines: list[str], beam: int, length_penalty: float) -> list[str]:
    """One line at a time, by the parts that are tested on their own."""
    from trimtab.models.encoder_decoder import EncoderDecoder

    trained = open_trained(run, TranslationRecipe)
    model = load_trained(trained, lambda: EncoderDecoder(trained.recipe.model))
    tokenizer = plain_tokenizer(trained.files["tokenizer.json"])
    found = []
    for line in lines:
        source = torch.tensor([[*tokenizer.encode(line, add_special_tokens=False).ids, 2]])
        tokens = translated(model, source, trained.recipe.model.target_vocab, beam, length_penalty)
        found += [" ".join(text.split()) for text in decode(tokenizer, tokens)]
    return found


def test_lines_of_a_file_and_of_standard_input(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, _ = sentences(6, 9)
    (tmp_path / "lines.en").write_text("\n".join(lines), encoding="utf-8")
    assert main(["translate", str(run), str(tmp_path / "lines.en")]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == expected(run, lines, 4, 0.6)
    assert any(printed.out.splitlines())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{lines[0]}\n".encode())))
    assert main(["translate", str(run), "--beam", "1", "--length-penalty", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == expected(run, lines[:1], 1, 0.0)


def test_empty_lines_stay_empty_and_long_ones_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["", "the dog", " \t", "the cat " * 15, "naïve 猫 \u2028 <pad>"]
    (tmp_path / "lines.en").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["translate", str(run), str(tmp_path / "lines.en")]) == 0
    printed = capsys.readouterr()
    out = printed.out.split("\n")[:-1]
    assert len(out) == 5
    assert out[0] == out[2] == ""
    assert [out[number] for number in (1, 3, 4)] == expected(run, [lines[n].strip() for n in (1, 3, 4)], 4, 0.6)
    notes = printed.err.splitlines()
    assert notes[0].startswith("note: line 4 has ")
    assert "the longest sentences in training had 20: its translation may be poor" in notes[0]
    (tmp_path / "none.en").write_text("", encoding="utf-8")
    assert main(["translate", str(run), str(tmp_path / "none.en")]) == 0
    assert capsys.readouterr().out == ""


def test_of_a_line_without_end_the_beginning_is_read_and_others_come_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trimtab.use.translate._LONGEST", 30)
    monkeypatch.setattr("trimtab.use.translate._LINES", 2)
    lines = ["the dog", "a cat", "x" * 5000, "big dog"]
    (tmp_path / "lines.en").write_text("\n".join(lines), encoding="utf-8")
    assert main(["translate", str(run), str(tmp_path / "lines.en")]) == 0
    printed = capsys.readouterr()
    out = printed.out.splitlines()
    assert [out[number] for number in (0, 1, 3)] == expected(run, [lines[n] for n in (0, 1, 3)], 4, 0.6)
    assert printed.err.startswith(
        "note: line 3 has 5,001 tokens, and the longest sentences in training had 20: only its"
    )
    monkeypatch.setattr(TranslationRecipe, "most_tokens", 3)
    (tmp_path / "one.en").write_text("the dog runs and the cat sleeps", encoding="utf-8")
    assert main(["translate", str(run), str(tmp_path / "one.en")]) == 0
    assert len(capsys.readouterr().out.split()) <= 3


def test_what_cannot_be_translated_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.en").write_bytes(b"fine\n\xff")
    for words, message in (
        ([str(tmp_path / "nowhere")], "is no run folder that can be read"),
        ([str(run), str(tmp_path / "bad.en")], "line 2 of"),
        ([str(run), str(tmp_path / "none.en")], "cannot be read (No such file"),
        ([str(run), "--beam", "0"], "--beam must be at least 1, got 0"),
        ([str(run), "--beam", "10000"], "beam must be at most model.target_vocab, "),
        ([str(run), "--length-penalty", "-1"], "--length-penalty must be at least 0 and finite, got -1"),
        ([], "trimtab translate needs RUN"),
    ):
        assert main(["translate", *words]) == 2
        assert message in capsys.readouterr().err
    images = replace(vit_digits(), steps=1, watch=False)
    train(images, tmp_path / "images", hardware=Hardware(accelerator="cpu"))
    assert main(["translate", str(tmp_path / "images")]) == 2
    assert "holds a run of ImagesRecipe; expected one of TranslationRecipe" in capsys.readouterr().err


def test_a_wide_beam_is_told_to_take_long(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.en").write_text("\n", encoding="utf-8")
    for beam, told in (("100", ""), ("250", "note: a beam of 250 may take 50 times as long as one of 5\n")):
        assert main(["translate", str(run), str(tmp_path / "lines.en"), "--beam", beam]) == 0
        assert capsys.readouterr() == ("\n", told)


def test_a_run_without_its_vocabulary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = run / "files" / "tokenizer.json"
    aside = tokenizer.rename(run / "tokenizer.json")
    assert main(["translate", str(run)]) == 2
    assert "lacks its vocabulary in files/: copy the whole run folder" in capsys.readouterr().err
    other = Tokenizer.from_file(str(aside))
    other.add_tokens(["猫"])
    tokenizer.write_text(other.to_str(), encoding="utf-8")
    assert main(["translate", str(run)]) == 2
    assert "the vocabularies in files/ have 291 and 291 tokens, and the model 290 and 290" in capsys.readouterr().err
    aside.rename(tokenizer)
