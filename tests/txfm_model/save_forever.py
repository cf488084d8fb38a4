"""A process that kills children which save one checkpoint after the other, and looks at what each left behind.

Its own program, because a fork of a process with as many threads as pytest may have is not safe.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from txfm_data.vocabulary import Vocabulary
from txfm_model.config import ModelConfig, TrainConfig, config_from_dict, config_to_dict
from txfm_model.model import TxFM
from txfm_model.optimizer_state import optimizer_tensors
from txfm_model.run_state import (
    CHECKPOINTS,
    RunState,
    find_resume,
    load_run_state,
    remove_leftovers,
    remove_old,
    save_run_state,
)

TRAINING = config_to_dict(config_from_dict(TrainConfig, {"shards": "s", "out": "o", "loop": {"steps": 10}}))


def saver() -> Callable[[Path, int], Path]:
    """Save a tiny model whose values tell the step."""
    vocabulary = Vocabulary(tuple(f"ENSG{i:011d}" for i in range(400)), ("",) * 400)
    model = TxFM(ModelConfig(width=16, blocks=2, decoder_blocks=1), vocabulary)
    optimizer = torch.optim.AdamW([model.head.bias])
    model.head.bias.sum().backward()
    optimizer.step()

    def save(out: Path, step: int) -> Path:
        with torch.no_grad():
            model.head.bias.fill_(step)
            optimizer.state[model.head.bias]["exp_avg"].fill_(step)
        state = RunState(
            step=step,
            stream={"epoch": 0, "batch": step},
            training=TRAINING,
            corpus_fingerprint="c0ffee",
            layout={},
            progress={},
            window={},
        )
        return save_run_state(out, model, optimizer_tensors(model, optimizer), state)

    return save


def save_until_killed(out: Path, said: int) -> None:
    """Go on as a run does: clear up, find the newest, save the next ones, remove old ones; say each that was saved."""
    save = saver()
    remove_leftovers(out)
    folder = find_resume(out, "auto")
    step = 0 if folder is None else load_run_state(folder).state.step
    os.write(said, b"0 ")
    while True:
        step += 1
        save(out, step)
        os.write(said, b"%d " % step)
        remove_old(out, 2, step=step)


def kill_one(out: Path, after_s: float) -> int:
    """Start a child and kill it; the newest step that it said was saved, 0 for none."""
    listen, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_until_killed(out, said)
        finally:
            os._exit(1)  # an error: the parent must not run twice
    os.close(said)
    heard = os.read(listen, 100)  # it is ready
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    while more := os.read(listen, 100):
        heard += more
    os.close(listen)
    return max(map(int, heard.split()))


def main(out: Path, kills: int, seed: int) -> dict[str, object]:
    """What was left after each kill: the newest step said, the step found, whether files are of it, hidden names."""
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a kill loses nothing that was written; only a loss of power would
    rng = np.random.default_rng(seed)
    save, started = saver(), time.perf_counter()
    for step in (1, 2, 3):
        save(out, step)
    one_save_s = (time.perf_counter() - started) / 3
    rounds = []
    for _ in range(kills):
        said = kill_one(out, rng.uniform(0, 4 * one_save_s))
        hidden = [path.suffix for path in (out / CHECKPOINTS).iterdir() if path.name.startswith(".step")]
        remove_leftovers(out)
        folder = find_resume(out, "auto")
        run = None if folder is None else load_run_state(folder)
        found = 0 if run is None else run.state.step
        is_whole = run is None or bool(
            torch.all(run.model.head.bias == found) and torch.all(run.optimizer["exp_avg/head.bias"] == found)
        )
        left = [path.name for path in (out / CHECKPOINTS).iterdir() if path.name.startswith(".step")]
        rounds.append({"said": said, "found": found, "is_whole": is_whole, "hidden": hidden, "left": left})
    return {"rounds": rounds}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")
