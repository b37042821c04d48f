import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speech_corpus import RATE, recipe, spoken, write_corpus

from trimtab.cli import main
from trimtab.tasks.speech.decode import Beam
from trimtab.tasks.speech.labels import read_labels
from trimtab.tasks.speech.speech_recipe import SpeechRecipe
from trimtab.train import Hardware, train
from trimtab.train.trained import open_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned its few tones, and has a search with an n-gram."""
    folder = tmp_path_factory.mktemp("speech")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        own = recipe(
            write_corpus(folder / "corpus"), steps=60, eval_every=60, watch_every=60, batch_size=12, lr=1e-2, clip=1.0,
            beam=Beam(width=4, ngram=2, ngram_weight=0.1),
        )  # fmt: skip
        result = train(own, folder / "run", hardware=Hardware(accelerator="cpu"))
    assert result.test["wer"] < 0.3
    return folder / "run"


def write(path: Path, text: str, rate: int = RATE) -> str:
    soundfile.write(path, spoken(text), rate)
    return str(path)


def test_recordings_are_written_down(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["A C", "BA CB", "CC A"]
    files = [write(tmp_path / f"{i}.wav", text) for i, text in enumerate(texts)]
    for words in ([], ["--beam", "1"], ["--beam", "8"]):
        assert main(["transcribe", str(run), *files, *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(": ")[0] for line in lines] == files
        heard = [line.partition(": ")[2] for line in lines]
        assert sum(a == b for a, b in zip(heard, texts, strict=True)) >= 2


def test_what_is_transcribed_is_what_the_run_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the test recordings: the same errors as result.json tells."""
    import json

    import jiwer

    folder = run.parent / "corpus" / "test"
    texts = [line.partition(" ")[2] for line in (folder / "all.trans.txt").read_text().splitlines()]
    files = [str(folder / f"{i}.wav") for i in range(len(texts))]
    test = json.loads((run / "result.json").read_text())["test"]
    for words, name in ((["--beam", "1"], "wer"), ([], "beam_wer")):
        assert main(["transcribe", str(run), *files, *words]) == 0
        heard = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
        assert jiwer.wer(texts, heard) == pytest.approx(test[name])


def test_what_cannot_be_used_is_told_and_the_rest_is_transcribed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, fast = write(tmp_path / "good.wav", "A B"), write(tmp_path / "fast.wav", "A B", 16000)
    text = tmp_path / "text.wav"
    text.write_text("no audio")
    cut = tmp_path / "cut.wav"
    cut.write_bytes(Path(good).read_bytes()[:-200])
    loud = tmp_path / "loud.wav"
    soundfile.write(loud, 1e30 * spoken("A B"), RATE, subtype="FLOAT")
    nameless = f"{tmp_path}/\udcff.wav"  # a name that is no UTF-8
    files = [str(cut), str(loud), nameless, fast, good, str(text), str(tmp_path / "gone.wav"), str(tmp_path)]
    assert main(["transcribe", str(run), *files]) == 1
    told = capsys.readouterr()
    assert f"error: {cut} is cut off: its header tells of 200 bytes more than there are" in told.err
    assert f"error: {loud} has samples of " in told.err
    assert "cannot be read: there is no such file" in told.err.splitlines()[2]
    assert told.out.startswith(f"{good}: ")
    assert f"error: {fast} has 16,000 samples a second, expected 8,000" in told.err
    assert f"error: {text} cannot be read" in told.err
    assert f"error: {tmp_path / 'gone.wav'} cannot be read: there is no such file" in told.err
    assert f"error: {tmp_path} cannot be read: it is a folder, expected a file" in told.err


def test_silence_is_transcribed_with_a_note(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, np.zeros(RATE), RATE)
    assert main(["transcribe", str(run), str(silence)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{silence}: ")
    assert told.err == f"note: {silence} is silent, every sample is the same: what is written down is made up\n"


def test_a_wide_beam_is_told_to_take_long(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.wav", "A")
    assert main(["transcribe", str(run), file, "--beam", "1000"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{file}: ")
    assert told.err == "note: a beam of 1,000 may take 200 times as long as one of 5\n"


def test_files_written_into_a_pipe_are_whole(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their header tells of the most bytes that there can be; and a name may be no UTF-8."""
    whole = Path(write(tmp_path / "whole.wav", "A B")).read_bytes()
    place = whole.index(b"data") + 4
    piped = os.fsencode(tmp_path) + b"/piped\xff.wav"
    with open(piped, "wb") as file:
        file.write(whole[:place] + b"\xff" * 4 + whole[place + 4 :])
    assert main(["transcribe", str(run), str(tmp_path / "whole.wav"), os.fsdecode(piped)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.partition(": ")[2] == second.partition(": ")[2] != ""


def test_what_was_said_is_compared_in_the_case_of_the_labels(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trimtab.tasks.speech.sets.samples import Sample

    monkeypatch.setattr(
        "trimtab.use.transcribe.sample_recordings",
        lambda name, count: [
            Sample(f"{name}/0", "ba cb", spoken("BA CB"), RATE),
            Sample("x", "é a", spoken("A"), RATE),
        ],
    )
    assert main(["transcribe", str(run), "fsdd", "--beam", "1"]) == 0
    told = capsys.readouterr()
    assert "(said: ba cb)" in told.out
    assert float(told.out.split()[-1]) < 0.7  # of three words one is unknown
    assert told.err == "note: 1 of the characters that were said are none of the model's\n"


@pytest.mark.skipif(not os.environ.get("TRIMTAB_DATA"), reason="TRIMTAB_DATA is not set")
def test_recordings_of_data_sets_are_transcribed_beside_what_is_said(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transcribe", str(run), "yesno", "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("yesno/0: ")
    assert lines[0].endswith("no no no no yes yes yes yes)")
    assert lines[2].startswith("word error rate of these 2: ")
    assert main(["transcribe", str(run), "librivox-mini"]) == 1
    assert "recordings of librivox-mini have 16,000 samples a second, expected 8,000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs RUN"),
        (["--beam", "0"], "--beam must be at least 1"),
        (["x.wav", "--beam", "0"], "--beam must be at least 1"),
        (["x.wav", "--count", "0"], "--count must be at least 1"),
        (["x.wav", ""], "AUDIO must name files or data sets; got an empty word"),
    ],
)
def test_wrong_words_are_one_line(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(run)] if words[:1] == ["x.wav"] else []
    assert main(["transcribe", *where, *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told or "needs" in told
    assert told.count("\n") == 1


def test_a_run_without_labels_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = open_trained(run, SpeechRecipe)
    assert read_labels(trained.files["labels.json"]).characters == " ABC"
    place = "trimtab.use.transcribe.open_trained"
    monkeypatch.setattr(place, lambda *_: replace(trained, files={}))
    assert main(["transcribe", str(run), "x.wav"]) == 2
    assert "lacks its labels, files/labels.json" in capsys.readouterr().err
    monkeypatch.setattr(place, lambda *_: replace(trained, files={"labels.json": '" AB"'}))
    assert main(["transcribe", str(run), "x.wav"]) == 2
    assert "files/labels.json has 4 labels and the model 5: copy the whole run folder" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["transcribe", str(tmp_path), "x.wav"]) == 2
    assert "no run folder" in capsys.readouterr().err
