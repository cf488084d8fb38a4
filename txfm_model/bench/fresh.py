"""A few training steps in a process of their own, for its peak memory: nothing that another row has left counts.

Run as a file with one JSON argument; prints one JSON object.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to train, and how often.

    model : `ModelConfig` as a tree.  row : name of the row.  steps : the second has the optimizer's state beside the activations.
    """

    shards: str
    model: dict[str, Any]
    row: str
    batch: int
    n_unmasked: int
    seed: int
    device: str
    threads: int | None = None
    steps: int = 2


@dataclass(frozen=True, kw_only=True)
class Found:
    """peak_bytes : most that model, optimizer and steps took at once. None on a CPU without /proc."""

    peak_bytes: int | None


def train_afresh(request: Request) -> Found:
    """Take the steps in a new process.

    Raises
    ------
    ValueError
        If it failed; with the last it said.
    """
    from shards.bench.fresh import run_afresh

    return Found(**run_afresh(__file__, asdict(request), f"{request.row}: its steps in a process of their own"))


def _train(request: Request) -> Found:
    import torch

    from shards.bench.fresh import PeakMemory
    from shards.manifest import Corpus
    from txfm_model.bench.rows import ROWS, Feed, Trainee
    from txfm_model.config import ModelConfig, config_from_dict

    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = torch.device(request.device)
    feed = Feed(
        Corpus(request.shards), batch=request.batch, n_unmasked=request.n_unmasked, seed=request.seed, device=device
    )
    batch = feed.next()
    feed.close()  # its thread and what it holds ahead
    config = config_from_dict(ModelConfig, request.model)

    def steps() -> None:
        trainee = Trainee(ROWS[request.row], config, feed, seed=request.seed)
        for _ in range(request.steps):
            trainee.step(batch)

    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        steps()
        return Found(peak_bytes=torch.cuda.max_memory_allocated(device) - before)
    with PeakMemory() as memory:
        steps()
    return Found(peak_bytes=memory.above_start)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.stdout.write(json.dumps(asdict(_train(Request(**json.loads(sys.argv[1]))))) + os.linesep)
