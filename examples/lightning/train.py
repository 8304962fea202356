"""Lightning: the loader's state is saved in Lightning's checkpoints, and training goes on at the same row.

python train.py                              # 40 steps, a checkpoint every 5 steps
python train.py --resume checkpoints/step=25.ckpt
"""

from __future__ import annotations

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import millrace
from millrace.feed.torch import FeedDataLoader


class Miller(lightning.LightningModule):
    """Learns how much flour a mill gives."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers
        self.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1)).double()

    def train_dataloader(self) -> FeedDataLoader:
        """Made in this hook, not before ``fit``: here Lightning has set up its ranks, and the loader asks for them."""
        ds = millrace.open("flour", cache="./cache")
        return FeedDataLoader(ds.loader, batch_size=32, seed=17, num_workers=self.workers)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        """The loss of this rank's rows."""
        loss = ((self.net(batch["x"]).squeeze(-1) - batch["y"]) ** 2).mean()
        print(f"step {self.global_step} loss {loss.item()!r} first {batch['y'][0].item()}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--resume", help="a checkpoint of Lightning's")
    args = parser.parse_args()
    torch.manual_seed(0)
    saving = ModelCheckpoint(dirpath="checkpoints", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=args.steps,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Miller(args.workers), ckpt_path=args.resume)


if __name__ == "__main__":
    main()
