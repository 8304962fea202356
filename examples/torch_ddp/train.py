"""Plain PyTorch DDP: trains on any number of processes, and goes on after a kill on any other number.

    torchrun --standalone --nproc-per-node 2 train.py    # or: python train.py --processes 2
    python train.py                                      # goes on from the newest checkpoint, on one process

A loss is that of the global batch: the sum over its rows, on whatever rank they are, divided by their number. So it is
the same number for every world size, up to the order in which floating-point numbers are added: in float64 and over a
few hundred steps the difference stays below 1e-9.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import millrace
from millrace.feed.torch import gather_receipts


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a step changes, with the same names for any number of ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def train(args: argparse.Namespace) -> None:
    """One rank's training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    ds = millrace.open("flour", cache="./cache")
    loader = ds.loader(batch_size=args.batch_size, seed=17)  # this rank's share: asks torch.distributed
    step = 0
    with millrace.checkpoints(args.name, placement={"replicas": 2, "min_clouds": 2}) as checkpoints:
        if (saved := checkpoints.latest()) is not None:
            state = state_of(model, optimizer)
            saved.load_into(state)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            loader.load_state_dict(saved.loader_state)
            step = saved.step
            say(f"goes on from step {step}, row {loader.position} of epoch {loader.epoch}")
        while step < args.steps:
            for batch in loader:
                step += 1
                loss = train_step(model, optimizer, batch)
                say(json.dumps({"step": step, "loss": loss}))
                if step % args.save_every == 0:
                    checkpoints.save(step, state_of(model, optimizer), loader)
                if step == args.steps:
                    break
            else:
                receipt = gather_receipts(loader)
                say(f"epoch {receipt.epoch}: rows {receipt.begin} to {receipt.end}, each once: {receipt.whole}")


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    """One step, and the loss of its global batch."""
    rows = torch.tensor(len(batch["y"]))
    dist.all_reduce(rows)  # ranks may have a row more or less than others, in an epoch's last step even none
    optimizer.zero_grad()
    errors = model(batch["x"]).squeeze(-1) - batch["y"]
    loss = (errors**2).sum() / rows
    (loss * dist.get_world_size()).backward()  # DDP gives the mean over ranks; this makes it their sum
    optimizer.step()
    total = loss.detach()
    dist.all_reduce(total)
    return float(total)


def say(line: str) -> None:
    """Print a line once, not on every rank."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def process(rank: int, meeting: str, args: argparse.Namespace) -> None:
    """One of several processes that this script started."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.processes)
    train(args)
    dist.destroy_process_group()


def main() -> None:
    """Train in this process if torchrun started it, else in as many as are asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1, help="how many to start; torchrun starts its own")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32, help="of the global batch")
    parser.add_argument("--save-every", type=int, default=5, help="steps from one checkpoint to the next")
    parser.add_argument("--name", default="flour-ddp", help="of the checkpoints")
    args = parser.parse_args()
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
        train(args)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (os.path.join(folder, "meeting"), args), nprocs=args.processes)


if __name__ == "__main__":
    main()
