"""What each process of a test under `accelerate launch` runs: it takes its part of an epoch and keeps a journal.

Arguments: folder of the corpus, folder of the run, processes expected, rank and batch at which to be killed (-1: never).
"""

import json
import os
import signal
import sys
from pathlib import Path

from accelerate import Accelerator

from shards.manifest import Corpus
from shards.stream import MaskedStream

SETTINGS = {"seed": 11, "global_batch": 8, "n_unmasked": 20}
EPOCH = 1


def saved_state(run: Path) -> dict | None:
    """State of the rank that came least far, as a run whose ranks step together goes on from."""
    states = [json.loads(path.read_text()) for path in sorted(run.glob("state-*.json"))]
    return min(states, key=lambda state: state["batch"], default=None)


def take_part(stream: MaskedStream, run: Path, rank: int, world_size: int, kill_at: int, wait) -> None:
    """Serve the rest of the epoch; every batch is in the journal, and the state saved, before the next one is asked for."""

    def save(state: dict) -> None:
        part = run / f"state-{rank}.part"
        part.write_text(json.dumps(state))
        part.rename(run / f"state-{rank}.json")

    state = saved_state(run) or stream.state(EPOCH, 0)
    start = stream.position(state)
    wait()  # until all have read it
    save(state)
    wait()
    with open(run / f"journal-{world_size}-{rank}.jsonl", "a") as journal:
        for batch in stream.epoch(*start):
            if batch.number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            line = {
                "batch": batch.number, "rank": rank, "ids": batch.sample_id.tolist(), "genes": batch.gene_ids.tolist(),
            }  # fmt: skip
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            save(stream.state_after(batch))
            wait()  # training waits for the gradients of all ranks here


def main() -> None:
    """Run as one of the processes that were launched."""
    corpus, run, expected, victim, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    accelerator = Accelerator()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    assert world_size == expected
    stream = MaskedStream(Corpus(corpus), **SETTINGS, rank=rank, world_size=world_size)
    take_part(stream, run, rank, world_size, kill_at if rank == victim else -1, accelerator.wait_for_everyone)
    accelerator.end_training()


if __name__ == "__main__":
    main()
