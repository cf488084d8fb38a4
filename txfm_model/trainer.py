"""The training loop, on the processes that `accelerate launch` started.

The loader is not prepared by Accelerate: the stream already gives each rank its part. Each step depends on
(corpus, configuration, step) alone: rate, samples, masks and stochastic depth are functions of it. So a checkpoint holds
weights, optimizer and a position, and a run that goes on from one is the run it would have been.
"""

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from txfm_data.progress import Progress, ignore
from txfm_model.config import TrainConfig, config_to_dict
from txfm_model.metrics import METRICS, MetricsWriter
from txfm_model.model import TxFM
from txfm_model.optimizer import learning_rate
from txfm_model.optimizer_state import optimizer_tensors
from txfm_model.preemption import Preempted, StopSignals
from txfm_model.provenance import describe_origin
from txfm_model.run import Run, prepare_run
from txfm_model.run_state import (
    CHECKPOINTS,
    RunState,
    check_same_run,
    checkpoint_name,
    find_resume,
    remove_old,
    save_run_state,
)
from txfm_model.step import train_step
from txfm_model.validation import PANEL_MEAN, panel_mean_losses, validate
from txfm_model.window import NonFiniteError, TrainWindow

if TYPE_CHECKING:
    from shards.stream import MaskedBatch

logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, progress: Progress = ignore) -> dict[str, Any]:
    """Train a model on a shard corpus; metrics, checkpoints and, at the end, the model go to `config.out`.

    Parameters
    ----------
    config
        The run. With `dry_run` nothing is trained or written: see `txfm_model.cost.dry_run`.
    progress
        Called as progress(steps done, steps in all) on the main process.

    Returns
    -------
    dict
        Plain values: steps, samples, seconds, losses, paths, processes. The same on every process.

    Raises
    ------
    FileExistsError
        If `config.out` already holds a run, and `config.resume` does not say to go on with it.
    ValueError
        If corpus, configuration and checkpoint do not fit, or a loss is not finite; checkpoints written before stay.
    Preempted
        After SIGTERM or SIGUSR1: a checkpoint was written, and the same command with `resume="auto"` goes on.
    """
    from txfm_model.checkpoint import save_checkpoint

    if config.dry_run:
        from txfm_model.cost import dry_run

        return dry_run(config)
    out, finished = _open_folder(config)
    if finished is not None:
        return finished
    run = prepare_run(config)
    is_main = run.accelerator.is_main_process
    with StopSignals() as signals:
        loop = _Loop(run, out, signals, progress if is_main else ignore)
        results = loop.run_all()
        model, _ = loop.gathered()
        if model is not None:
            model.statistics, model.provenance = run.corpus.statistics, loop.provenance() | {"results": results}
            save_checkpoint(model, out / "checkpoint")
        run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return results | _paths(out)


def _paths(out: Path) -> dict[str, str]:
    return {"checkpoint": str(out / "checkpoint"), "metrics": str(out / METRICS)}


def _open_folder(config: TrainConfig) -> tuple[Path, dict[str, Any] | None]:
    """Folder of the run; and the results of a run that `resume="auto"` finds finished there."""
    out = config.out
    if "://" in out:
        raise ValueError(f"out: {out} is a URL; a run is written to a local folder, copy it from there afterwards")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out: {folder} is a file; give a folder")
    if config.resume is not None and (folder / "checkpoint").exists():
        return folder, _finished(config, folder)
    for taken in (folder / "checkpoint", folder / "config.json"):
        if taken.exists():
            raise FileExistsError(f"out: {folder} already holds a checkpoint ({taken}); choose another folder")
    own = folder / CHECKPOINTS
    is_of_another = config.resume is None or (
        config.resume != "auto" and Path(config.resume).resolve().parent != own.resolve()
    )
    if is_of_another and any(own.glob("step-*")):
        raise FileExistsError(
            f"out: {folder} holds checkpoints of an unfinished run ({own}); go on with it by --resume auto, or choose another "
            f"folder"
        )
    return folder, None


def _finished(config: TrainConfig, folder: Path) -> dict[str, Any]:
    from txfm_model.checkpoint import load_checkpoint

    provenance = load_checkpoint(folder / "checkpoint").provenance
    if "results" not in provenance:
        raise FileExistsError(f"out: {folder / 'checkpoint'} was not written by a training run; choose another folder")
    check_same_run(provenance["training"], config)
    logger.info("%s: this run is finished; there is nothing left to do", folder)
    return provenance["results"] | _paths(folder) | {"already_finished": True}


class _Loop:
    """The steps of one run, from where it goes on to its end."""

    def __init__(self, run: Run, out: Path, signals: StopSignals, progress: Progress) -> None:
        self.run, self.out, self.signals, self.progress = run, out, signals, progress
        earlier = run.resumed
        kept: dict[str, Any] = {} if earlier is None else earlier.progress
        self.step = 0 if earlier is None else earlier.step
        self.first_step = self.step
        self.train_line: dict[str, float] = kept.get("train_line", {})
        self.val_line: dict[str, Any] = kept.get("val_line", {})
        self.before_s, self.training_s = kept.get("seconds", 0.0), kept.get("training_s", 0.0)
        # Asked now: by the time of a checkpoint the files of the program may be others than those that run.
        self.origin = describe_origin(run.config, run.corpus.fingerprint)
        self.history = [*kept.get("history", []), self._layout() | {"from_step": self.step}]
        self.window = self._new_window({} if earlier is None else earlier.window)
        self.started = self.window_started = time.perf_counter()
        self.window_wait, self.window_steps = run.stream.wait_s, 0

    def run_all(self) -> dict[str, Any]:
        """Run every step that is left; returns the results that do not depend on paths."""
        run, loop = self.run, self.run.config.loop
        with self._writer() as writer:
            for epoch, batch in self._batches():
                self._one_step(batch)
                if self.step % loop.log_every == 0 or self.step == run.total_steps:
                    self._log(writer, epoch)
                if self.step % loop.validate_every == 0 or self.step == run.total_steps:
                    self._validate(writer, epoch)
                self._checkpoint(batch)
                self.progress(self.step, run.total_steps)
        return self._results()

    def _batches(self) -> "Iterator[tuple[float, MaskedBatch]]":
        """Epochs done after each step that is left, and this rank's batch, over as many epochs as it takes."""
        stream, earlier = self.run.stream, self.run.resumed
        first_epoch, first_batch = (0, 0) if earlier is None else stream.position(earlier.stream)
        for epoch in itertools.count(first_epoch):
            n_batches = stream.batches_in_epoch(epoch)
            batches = stream.epoch(epoch, first_batch)
            first_batch = 0
            for batch in itertools.islice(batches, self.run.total_steps - self.step):
                yield epoch + (batch.number + 1) / n_batches, batch
            batches.close()
            if self.step == self.run.total_steps:
                return

    def _one_step(self, batch: "MaskedBatch") -> None:
        run = self.run
        train_step(run, batch, learning_rate(self.step, run.total_steps, run.config.optim), self.window)
        self.step += 1
        self.window_steps += 1
        if run.config.loop.compile and self.step == self.first_step + 1:
            logger.info("the first step, with its compilation, took %.0f s", time.perf_counter() - self.started)
            self._restart_clock()

    def _log(self, writer: MetricsWriter | None, epoch: float) -> None:
        run = self.run
        elapsed = max(time.perf_counter() - self.window_started, 1e-9)
        with self._says_what_is_kept():
            line = self.window.summary(run.accelerator, self.step)
        line["lr"] = learning_rate(self.step - 1, run.total_steps, run.config.optim)
        line["samples_per_s"] = self.window_steps * run.config.loop.global_batch / elapsed
        line["data_wait_fraction"] = min(1.0, (run.stream.wait_s - self.window_wait) / elapsed)
        self.train_line = line
        if writer is not None:
            writer.write("train", self.step, epoch, dict(line))
        self.window = self._new_window({})
        self._restart_clock()

    def _validate(self, writer: MetricsWriter | None, epoch: float) -> None:
        before = time.perf_counter()
        with self._says_what_is_kept():
            measured = validate(self.run, self.step)
        if not self.val_line:
            self.val_line = panel_mean_losses(self.run)
        self.val_line = {name: self.val_line[name] for name in PANEL_MEAN} | measured
        if writer is not None:
            writer.write("val", self.step, epoch, dict(self.val_line))
        self._leave_out(time.perf_counter() - before)

    def _checkpoint(self, batch: "MaskedBatch") -> None:
        """Save where one is due, or where the run was told to stop."""
        every = self.run.config.loop.checkpoint_every
        is_told = self.signals.agree(self.step)
        if self.step == self.run.total_steps:  # the run ends now anyway
            return
        if is_told or (every is not None and self.step % every == 0):
            before = time.perf_counter()
            folder = self._save(batch, must=is_told)
            if is_told:
                raise Preempted(self.step, folder)
            self._leave_out(time.perf_counter() - before)

    def _save(self, batch: "MaskedBatch", *, must: bool) -> Path | None:
        """Write a checkpoint from the main process; every process learns whether that went well.

        A checkpoint that cannot be written (a full disk) costs nothing yet: unless it `must` be there the run goes on, and
        tries again when the next one is due.
        """
        run = self.run
        with self._says_what_is_kept():
            window = self.window.state(run.accelerator, self.step)
        model, optimizer = self.gathered()
        folder, error = None, None
        if model is not None:
            model.statistics, model.provenance = run.corpus.statistics, self.provenance()
            try:
                folder = save_run_state(self.out, model, optimizer, self._state(batch, window))
            except (OSError, ValueError) as failed:
                error = failed
        is_fatal = error is not None and (must or not isinstance(error, OSError))
        answer = torch.tensor(int(is_fatal), device=run.accelerator.device)
        if int(run.accelerator.reduce(answer, "sum")):
            raise error or OSError(f"step {self.step}: the main process could not write the checkpoint and says why")
        if error is not None:
            logger.error("step %d: no checkpoint was written, training goes on: %s", self.step, error)
        elif folder is not None:
            self._remove_old()
        return None if error is not None else self.out / CHECKPOINTS / checkpoint_name(self.step)

    def _remove_old(self) -> None:
        try:
            remove_old(self.out, self.run.config.loop.keep_checkpoints, step=self.step)
        except OSError as error:
            logger.error("step %d: older checkpoints could not be removed, training goes on: %s", self.step, error)

    def gathered(self) -> tuple[TxFM | None, dict[str, Tensor]]:
        """Model and optimizer state to be saved, whole, on the main process; None and nothing on the others."""
        run = self.run
        if run.is_sharded:
            from txfm_model.fsdp import full_copy, full_optimizer_tensors

            return full_copy(run.model), full_optimizer_tensors(run.wrapped, run.optimizer)
        if not run.accelerator.is_main_process:
            return None, {}
        return run.model, optimizer_tensors(run.model, run.optimizer)

    def _state(self, batch: "MaskedBatch", window: dict[str, Tensor]) -> RunState:
        run = self.run
        return RunState(
            step=self.step,
            stream=run.stream.state_after(batch),
            training=config_to_dict(run.config),
            corpus_fingerprint=run.corpus.fingerprint,
            layout=self._layout(),
            progress={
                "train_line": self.train_line,
                "val_line": self.val_line,
                "seconds": self._seconds(),
                "training_s": self.training_s + time.perf_counter() - self.window_started,
                "history": self.history,
                "init": run.init,
            },
            window=window,
        )

    def _layout(self) -> dict[str, Any]:
        accelerator, loop = self.run.accelerator, self.run.config.loop
        return {
            "processes": accelerator.num_processes,
            "accumulation": loop.accumulation,
            "precision": self.run.precision,
            "device": accelerator.device.type,
        }

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, as far as it is known by now."""
        return self.origin | {"step": self.step, "history": self.history, "init": self.run.init}

    def _results(self) -> dict[str, Any]:
        run = self.run
        samples = run.total_steps * run.config.loop.global_batch
        return {
            "steps": run.total_steps,
            "samples": samples,
            "seconds": self._seconds(),
            "samples_per_s": samples / max(self.training_s, 1e-9),
            "parameters": run.model.n_parameters,
            "train_loss": self.train_line["loss"],
            "train_excess": self.train_line["excess"],
            "val_loss": self.val_line["loss"],
            "val_excess": self.val_line["excess"],
            "panel_mean_val_loss": self.val_line["panel_mean_loss"],
            "panel_mean_val_excess": self.val_line["panel_mean_excess"],
            "val_samples": run.corpus.n_samples("val"),
            "loss": run.config.loss.kind,
            "resumed_from_step": self.first_step,
            "init": run.init,
            "cpu_threads": torch.get_num_threads(),
            **self._layout(),
        }

    @contextmanager
    def _says_what_is_kept(self) -> Iterator[None]:
        """Let the end of a run by a loss that is not finite say which checkpoint is the last finite one."""
        try:
            yield
        except NonFiniteError as error:
            kept = find_resume(self.out, "auto")
            said = f"the last finite checkpoint is {kept}" if kept else "no checkpoint had been written"
            raise NonFiniteError(f"{error}; {said}") from error

    def _new_window(self, earlier: dict[str, Tensor]) -> TrainWindow:
        return TrainWindow(len(self.run.corpus.vocabulary), self.run.accelerator.device, earlier)

    def _writer(self) -> AbstractContextManager[MetricsWriter | None]:
        if not self.run.accelerator.is_main_process:
            return nullcontext()
        return MetricsWriter(self.out, after_step=None if self.run.resumed is None else self.step)

    def _restart_clock(self) -> None:
        """Begin to time a log window, and add the one before to the time trained."""
        now = time.perf_counter()
        self.training_s += now - self.window_started
        self.window_started, self.window_wait, self.window_steps = now, self.run.stream.wait_s, 0

    def _leave_out(self, seconds: float) -> None:
        """Validation and saving are no part of a log window."""
        self.window_started += seconds

    def _seconds(self) -> float:
        return self.before_s + time.perf_counter() - self.started
