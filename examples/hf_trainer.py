"""Trimtab in Hugging Face's Trainer: a small GPT-2 learns to count.

    pip install 'trimtab[huggingface]'
    python examples/hf_trainer.py --folder runs/gpt2

The lines marked `# trimtab` are all there is to it. See the run, also while it goes on: `trimtab watch runs/gpt2`.
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from trimtab.watch.sinks.huggingface import TrimtabCallback  # trimtab


def counts(num: int = 256, length: int = 16, vocab_size: int = 32) -> list[dict[str, torch.Tensor]]:
    """Sequences that count up from somewhere, modulo the vocabulary."""
    rows = [(torch.arange(length) + start) % vocab_size for start in torch.randint(vocab_size, (num,)).tolist()]
    return [{"input_ids": row, "labels": row} for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/gpt2", help="where the run is written: a new folder")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        output_dir=f"{options.folder}/trainer",
        max_steps=options.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callback = TrimtabCallback(options.folder, every=10)  # trimtab
    trainer = Trainer(model, arguments, train_dataset=counts(), callbacks=[callback])  # trimtab: callbacks=[callback]
    trainer.train()
    print(f"alarms: {[alarm.message for alarm in callback.watch.alarms] or 'none'}")  # trimtab


if __name__ == "__main__":
    main()
