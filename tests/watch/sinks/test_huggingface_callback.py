import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="Trainer needs it")
transformers = pytest.importorskip("transformers")

from trimtab.watch.sinks.huggingface import TrimtabCallback  # noqa: E402


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def texts(num: int = 32) -> list[dict[str, torch.Tensor]]:
    """Random tokens of several lengths, so that micro-batches hold different numbers of labels."""
    drawn = torch.Generator().manual_seed(1)
    rows = []
    for row in range(num):
        tokens = torch.randint(13, (12,), generator=drawn)
        labels = tokens.clone()
        labels[4 + row % 8 :] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def train(folder: Path, *callbacks: Any, trainer: type = transformers.Trainer, **options: Any) -> Any:
    """A run of Trainer; its every step's own loss is in `state.log_history`."""
    defaults = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **defaults | options,
    )
    run = trainer(gpt2(), arguments, train_dataset=texts(), callbacks=list(callbacks))
    run.train()
    return run


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def trainers_losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_weights_and_the_losses_are_trainers_own(tmp_path, leaves_nothing, accumulation) -> None:
    """32 texts in batches of 4 are 8 a pass: with 3 to a step the third step of a pass has only 2."""
    alone = train(tmp_path, gradient_accumulation_steps=accumulation)
    callback = TrimtabCallback(tmp_path / "run", every=1)
    watched = train(tmp_path, callback, gradient_accumulation_steps=accumulation)
    for (name, expected), got in zip(alone.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(expected, got), name
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    # Trainer adds the micro-batches' losses up one by one, in float32
    assert [line["loss"] for line in lines] == pytest.approx(trainers_losses(watched), rel=3e-7)
    assert all(line["lr"] and math.isfinite(line["entropy_min"]) for line in lines)
    assert [line["lr"][0] for line in lines] == pytest.approx([1e-2, 8e-3, 6e-3, 4e-3, 2e-3])
    leaves_nothing(watched.model)


def test_run_json_knows_what_trainer_knows(tmp_path) -> None:
    train(tmp_path, TrimtabCallback(tmp_path / "run", run={"data": "random"}), seed=7)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["recipe"] == {"steps": 5, "lr": 1e-2, "batch_size": 4, "accumulation": 1}
    assert (info["seed"], info["data"], info["trainer"]) == (7, "random", "transformers")


def test_evaluation_in_between_is_not_taken_for_training(tmp_path) -> None:
    class Evaluates(transformers.Trainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, eval_dataset=texts(4), **options)

    run = train(
        tmp_path, TrimtabCallback(tmp_path / "run", every=1), trainer=Evaluates, eval_strategy="steps", eval_steps=1
    )
    assert [line["loss"] for line in log(tmp_path / "run")] == pytest.approx(trainers_losses(run), rel=3e-7)


def test_a_loss_that_the_model_does_not_return_is_given_by_hand(tmp_path) -> None:
    callback = TrimtabCallback(tmp_path / "run", every=2)

    class Gives(transformers.Trainer):
        def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*args, **options)
            callback.see_loss(loss)
            return loss

    options = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    run = train(tmp_path, callback, trainer=Gives, **options)
    lines, losses = log(tmp_path / "run"), trainers_losses(run)
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert [line["loss"] for line in lines] == pytest.approx([losses[0], losses[1], losses[3]], rel=3e-7)


def test_without_any_loss_it_says_what_to_do(tmp_path, leaves_nothing) -> None:
    models: list[nn.Module] = []

    class Keeps(transformers.Trainer):
        def training_step(self, model: nn.Module, *args: Any, **options: Any) -> torch.Tensor:
            models.append(model)
            return super().training_step(model, *args, **options)

    with pytest.raises(RuntimeError, match="override training_step of your Trainer"):
        train(tmp_path, TrimtabCallback(tmp_path / "run"), trainer=Keeps, label_smoothing_factor=0.1)
    assert len(models) == 1
    leaves_nothing(models[0])


def test_an_error_in_training_leaves_nothing_once_it_is_closed(tmp_path, leaves_nothing) -> None:
    callback = TrimtabCallback(tmp_path / "run", every=1)
    models: list[nn.Module] = []

    class Breaks(transformers.Trainer):
        def training_step(self, model: nn.Module, *args: Any, **options: Any) -> torch.Tensor:
            models.append(model)
            if len(models) == 3:
                raise ConnectionError("the data went away")
            return super().training_step(model, *args, **options)

    with pytest.raises(ConnectionError):
        train(tmp_path, callback, trainer=Breaks)
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2]
    callback.close()
    callback.close()
    leaves_nothing(models[0])
    assert callback.watch is not None
    assert callback.watch.last["step"] == 2


def test_options_go_to_watch(tmp_path) -> None:
    with pytest.raises(TypeError, match="flavour"):
        train(tmp_path, TrimtabCallback(tmp_path / "run", flavour="sweet"))
    alarms: list[Any] = []
    train(
        tmp_path, TrimtabCallback(tmp_path / "loud", every=1, on_alarm=alarms.append), learning_rate=100.0, max_steps=12
    )
    assert alarms


def test_the_model_can_be_copied_and_saved_meanwhile(tmp_path) -> None:
    """As callbacks do that keep an average of the weights, or the best ones."""

    class Copies(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            torch.save(model, tmp_path / "model.pt")
            copies.append(copy.deepcopy(model))

    copies: list[nn.Module] = []
    run = train(tmp_path, TrimtabCallback(tmp_path / "run", every=1), Copies(), max_steps=2)
    assert len(log(tmp_path / "run")) == len(copies) == 2
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    tokens = torch.arange(12).view(1, 12)
    run.model.eval()
    for each in copies[1:]:
        assert torch.equal(each.eval()(tokens).logits, run.model(tokens).logits)
    copies[0].train()(tokens, labels=tokens)  # a copy is not watched
    assert len(log(tmp_path / "run")) == 2
