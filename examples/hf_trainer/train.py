"""Hugging Face Trainer: batches come ready-made from the feed, and a checkpoint has the feed's place in it.

python train.py                              # 40 steps, a checkpoint every 5 steps
python train.py --resume out/checkpoint-25
torchrun --standalone --nproc-per-node 2 train.py
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import millrace
from millrace.feed.torch import FeedDataLoader

STATE = "feed.json"


class FeedTrainer(Trainer):
    """A Trainer whose training batches come from a dataset of Millrace.

    The loader isn't wrapped by accelerate: it knows the ranks, makes whole batches and keeps the order itself.
    """

    def __init__(self, *args: Any, feed: Any, columns: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feed = feed
        self.columns = columns
        self.add_callback(FeedPlace())

    def get_train_dataloader(self) -> FeedDataLoader:
        """Global batches of ``per_device_train_batch_size`` rows for each device."""
        return FeedDataLoader(
            self.feed.loader,
            batch_size=self.args.train_batch_size * self.args.world_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            columns=self.columns,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=self.args.dataloader_drop_last,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def num_examples(self, _: Any) -> int:
        """Rows in an epoch; what is printed as such."""
        return len(self.feed)


class FeedPlace(TrainerCallback):
    """Saves the feed's place with each checkpoint and goes there when training resumes. Needs ``ignore_data_skip``."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Say so if the Trainer would skip batches by itself."""
        if not args.ignore_data_skip:
            raise ValueError("set ignore_data_skip=True: the feed resumes by its own state, without reading to skip")
        self.begun = state.global_step

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """The Trainer has just called ``set_epoch``; for the epoch that is resumed that is not the place."""
        if state.global_step and state.global_step == self.begun:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
            more["train_dataloader"].load_state_dict(json.loads(saved.read_text()))

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """Beside the Trainer's own files."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / STATE).write_text(json.dumps(more["train_dataloader"].state_dict()))


class Miller(nn.Module):
    """Learns how much flour a mill gives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1)).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss, as a Trainer wants it."""
        loss = ((self.net(x).squeeze(-1) - y) ** 2).mean()
        if self.training:
            print(f"loss {loss.item()!r} first {y[0].item()}", flush=True)
        return {"loss": loss}


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--resume", help="a checkpoint's folder")
    args = parser.parse_args()
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=32 // int(os.environ.get("WORLD_SIZE", "1")),  # the global batch has 32 rows
        max_steps=args.steps,
        save_steps=5,
        seed=17,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        dataloader_num_workers=args.workers,
        ignore_data_skip=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    ds = millrace.open("flour", cache="./cache")
    trainer = FeedTrainer(model=Miller(), args=arguments, feed=ds, columns=["x", "y"])
    trainer.train(resume_from_checkpoint=args.resume)


if __name__ == "__main__":
    main()
