"""The plain model and the fast one beside each other, training on the same stream: what `txfm bench train` measures."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch

from shards.bench.rounds import Spent, Work, alternate
from shards.manifest import Corpus
from txfm_data.progress import Progress, ignore
from txfm_model.bench.counted import count_flops
from txfm_model.bench.fresh import Request, train_afresh
from txfm_model.bench.goals import Measured, Setting, goals, paired
from txfm_model.bench.machine import describe_machine
from txfm_model.bench.matmul import matmul_rate
from txfm_model.bench.rows import Feed, Precision, Row, Trainee
from txfm_model.bench.variants import SAVINGS, VARIANTS
from txfm_model.config import LoopConfig, ModelConfig, TrainConfig, config_to_dict
from txfm_model.cost import Flops, memory_estimate, parameter_count, skipped_flops, train_flops

logger = logging.getLogger(__name__)

_MATMUL_S = 0.15  # of each size, in each round


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model with what it is measured with. batch : samples of a step.  n_unmasked : genes shown."""

    model: ModelConfig
    n_unmasked: int
    batch: int


PRESETS = {
    "cpu": Preset(model=ModelConfig(width=384, blocks=6, heads=6), n_unmasked=1_024, batch=8),
    "tiny": Preset(model=ModelConfig(layerscale_init=0.1, codebook_std=0.5), n_unmasked=384, batch=48),
    "s": Preset(model=ModelConfig(width=384, blocks=12, heads=6), n_unmasked=1_024, batch=256),
    "b": Preset(model=ModelConfig(width=768, blocks=12, heads=12), n_unmasked=2_048, batch=64),
    "l": Preset(model=ModelConfig(width=1_024, blocks=24, heads=16, stochastic_depth=0.3), n_unmasked=2_048, batch=32),
}
"""Models by name: `cpu` is what the goals on a CPU are of, the others those of configs/."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How training is measured.

    model : the network.  batch : samples of a step.  n_unmasked : genes shown.  steps : of each row in a round.  rounds : that
    count, after one that warms up.  precisions : "no" is float32.  compiles : the fast model compiled, too.  without : the fast
    model without each of these of `SAVINGS`, too.  measures_memory : of each row, in a process of its own.
    device : "cpu" or "cuda".  threads : of PyTorch; None leaves them.
    """

    model: ModelConfig
    batch: int
    n_unmasked: int
    steps: int = 1
    rounds: int = 5
    precisions: tuple[Precision, ...] = ("no", "bf16")
    compiles: bool = False
    without: tuple[str, ...] = ()
    measures_memory: bool = True
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.without if name not in SAVINGS]
        if unknown or len(set(self.without)) < len(self.without):
            raise ValueError(
                f"without must name savings of {', '.join(SAVINGS)}, each once, got {' '.join(self.without)}"
            )

    @property
    def rows(self) -> list[Row]:
        """What is run, in the order of the table."""
        rows = [Row(variant=form, precision=p) for p in self.precisions for form in ("plain", "fast")]
        if self.compiles:
            rows += [Row(variant="fast", precision=p, is_compiled=True) for p in self.precisions]
        return rows + [Row(variant=saving, precision=p) for p in self.precisions for saving in self.without]


def bench_train(corpus: Corpus, config: BenchConfig, *, progress: Progress = ignore) -> dict[str, Any]:
    """Measure all rows on one corpus, in rounds that alternate; memory of each first, in a process of its own.

    Returns
    -------
    dict
        kind, corpus, settings, machine, matmul, rows, savings (of `without`), goals: as JSON can hold it.

    Raises
    ------
    ValueError
        If corpus and batch do not fit.
    """
    device = torch.device(config.device)
    with _threads(config.threads):
        feed = Feed(corpus, batch=config.batch, n_unmasked=config.n_unmasked, seed=config.seed, device=device)
        with contextlib.closing(feed):
            peaks = {row.name: _peak(corpus, config, row) for row in config.rows}
            runs = _Runs.of(feed, config)
            works: dict[str, Work] = {name: runs.work(name) for name in runs.trainees}
            works |= {f"matmul_{p}": runs.matmul_work(p) for p in config.precisions}
            alternate(works, config.rounds, progress)
    rows = [_row(row, config, runs, peaks[row.name], len(corpus.vocabulary)) for row in config.rows]
    measured = {row["name"]: _measured(row) for row in rows if row["rounds"]}
    missing = {row["name"]: row["why"] for row in rows if not row["rounds"]}
    machine = describe_machine(device)
    all_goals = goals(measured, missing, _setting(config, len(corpus.vocabulary), machine))
    return {
        "kind": "train", "corpus": _about(corpus), "machine": machine,
        "settings": asdict(replace(config, model=ModelConfig())) | {"model": config_to_dict(config.model)},
        "parameters": parameter_count(config.model, len(corpus.vocabulary)),
        "matmul": {p: median(runs.matmul[p][1:]) for p in config.precisions},
        "rows": rows, "savings": _savings(config, rows),
        "goals": [asdict(goal) | {"is_met": goal.is_met} for goal in all_goals],
    }  # fmt: skip


@dataclass(kw_only=True)
class _Runs:
    """Rows that run, and what was seen of them; the first round of each list warms up.

    first_s : seconds of the first step, which compiles where a row is compiled.  why : of rows that do not run.
    flops : per sample, as torch counts them.
    """

    feed: Feed
    config: BenchConfig
    trainees: dict[str, Trainee] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    waits: dict[str, list[float]] = field(default_factory=dict)
    matmul: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, feed: Feed, config: BenchConfig) -> "_Runs":
        """Make every row and take its first step."""
        runs = cls(feed=feed, config=config, matmul={p: [] for p in config.precisions})
        for row in config.rows:
            runs._start(row)
        return runs

    def _start(self, row: Row) -> None:
        batch = self.feed.next()
        since = time.perf_counter()
        try:
            trainee = Trainee(row, self.config.model, self.feed, seed=self.config.seed)
            trainee.step(batch)
            self._wait_for_device()
            self.first_s[row.name] = time.perf_counter() - since
            if not row.is_compiled:
                self.flops[row.name] = count_flops(lambda: trainee.backward(batch, drops=False)) / self.config.batch
        except RuntimeError as error:  # out of memory; or no compiler
            self.why[row.name] = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:120]
            return
        self.trainees[row.name] = trainee
        self.seconds[row.name], self.waits[row.name] = [], []

    def work(self, name: str) -> Work:
        """A round of one row."""
        trainee, steps = self.trainees[name], self.config.steps

        def run(number: int) -> Spent:
            waited, wall, cpu = self.feed.wait_s, time.perf_counter(), time.process_time()
            samples = 0
            for _ in range(steps):
                batch = self.feed.next()
                trainee.step(batch)
                samples += len(batch)
            self._wait_for_device()
            spent = Spent(samples, time.perf_counter() - wall, time.process_time() - cpu)
            self.seconds[name].append(spent.wall_s)
            self.waits[name].append(self.feed.wait_s - waited)
            return spent

        return run

    def matmul_work(self, precision: Precision) -> Work:
        """The device's matmul rate, in its turn."""

        def run(number: int) -> Spent:
            wall, cpu = time.perf_counter(), time.process_time()
            self.matmul[precision].append(matmul_rate(self.feed.device, precision, _MATMUL_S))
            return Spent(1, time.perf_counter() - wall, time.process_time() - cpu)

        return run

    def _wait_for_device(self) -> None:
        if self.feed.device.type == "cuda":
            torch.cuda.synchronize(self.feed.device)


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _peak(corpus: Corpus, config: BenchConfig, row: Row) -> tuple[int | None, str]:
    """Peak bytes of a row, or why there are none. Compiled rows have none: compiling takes memory of its own."""
    if row.is_compiled or not config.measures_memory:
        return None, "not measured"
    logger.info("measuring the memory of: %s", row.label.strip())
    request = Request(
        shards=str(corpus.address), model=config_to_dict(config.model), row=row.name, batch=config.batch,
        n_unmasked=config.n_unmasked, seed=config.seed, device=config.device, threads=config.threads,
    )  # fmt: skip
    try:
        return train_afresh(request).peak_bytes, ""
    except ValueError as error:  # out of memory: other rows go on
        return None, str(error)


def _counted(row: Row, config: BenchConfig, n_genes: int) -> Flops:
    """FLOPs from the configuration, of what this row computes."""
    shape = (config.model, n_genes, config.n_unmasked, config.batch)
    plain = train_flops(*shape, form="plain")
    if row.variant == "plain":
        return plain
    fast = train_flops(*shape, activation_checkpointing=row.variant == "checkpointed")
    parts: tuple[str, ...]
    if row.variant == "last_block":
        parts = ("qkv", "attention", "out", "mlp", "last_block")
    elif row.variant == "gathered":
        parts = ("tokens",)
    else:
        return fast
    again = plain.recomputed if row.variant == "last_block" else fast.recomputed
    return Flops(
        forward=fast.forward | {part: plain.forward[part] for part in parts},
        backward=fast.backward | {part: plain.backward[part] for part in parts},
        recomputed=again,
    )


def _row(row: Row, config: BenchConfig, runs: _Runs, peak: tuple[int | None, str], n_genes: int) -> dict[str, Any]:
    counted = _counted(row, config, n_genes)
    found: dict[str, Any] = {
        "name": row.name, "label": row.label, "variant": row.variant, "precision": row.precision,
        "is_compiled": row.is_compiled, "flops_per_sample": counted.total, "flops_executed_per_sample": counted.executed,
        "flops_per_sample_by_torch": runs.flops.get(row.name), "first_step_s": runs.first_s.get(row.name), "peak_bytes": peak[0],
        "no_peak": peak[1],
        "estimated_bytes": _estimate(row, config, n_genes), "why": runs.why.get(row.name, ""), "rounds": [],
        "samples_per_s": None, "tokens_per_s": None, "flops_per_s": None, "matmul_share": None, "data_wait_share": None,
    }  # fmt: skip
    if row.name not in runs.trainees:
        return found
    seconds, waits = runs.seconds[row.name][1:], runs.waits[row.name][1:]
    rounds = [config.steps * config.batch / s for s in seconds]
    rate = median(rounds)
    computes_all = VARIANTS[row.variant].computes_all or row.is_compiled
    done = counted.total - (0 if computes_all else skipped_flops(config.model, counted))
    return found | {
        "rounds": rounds, "samples_per_s": rate, "tokens_per_s": rate * (config.n_unmasked + 1),
        "flops_per_s": rate * done, "data_wait_share": sum(waits) / sum(seconds),
        "matmul_share": rate * done / median(runs.matmul[row.precision][1:]),
    }  # fmt: skip


def _estimate(row: Row, config: BenchConfig, n_genes: int) -> int | None:
    """Bytes as `memory_estimate` has them, without the batch that was there before; of what it knows."""
    if row.variant not in ("fast", "checkpointed"):
        return None
    loop = LoopConfig(steps=1, global_batch=config.batch, activation_checkpointing=row.variant == "checkpointed")
    train = TrainConfig(shards="-", out="-", model=config.model, loop=loop)
    parts = memory_estimate(train, n_genes, config.n_unmasked, precision=row.precision)
    return parts["total"] - parts["batch"]


def _measured(row: dict[str, Any]) -> Measured:
    return Measured(
        samples_per_s=tuple(row["rounds"]), matmul_share=row["matmul_share"], wait_share=row["data_wait_share"],
        peak_bytes=row["peak_bytes"],
    )  # fmt: skip


def _savings(config: BenchConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each saving gains: rate of the fast model over its rate without it, foretold from FLOPs and found."""
    of = {row["name"]: row for row in rows}
    found = []
    for precision in config.precisions:
        fast = of[Row(variant="fast", precision=precision).name]
        for saving in config.without:
            other = of[Row(variant=saving, precision=precision).name]
            both = fast["rounds"] and other["rounds"]
            found.append({
                "name": other["name"], "label": VARIANTS[saving].label.strip(), "precision": precision,
                "work": other["flops_executed_per_sample"] / fast["flops_executed_per_sample"],
                "gain": paired(fast["rounds"], other["rounds"]) if both else None,
                "memory": other["peak_bytes"] / fast["peak_bytes"] if other["peak_bytes"] and fast["peak_bytes"] else None,
            })  # fmt: skip
    return found


def _setting(config: BenchConfig, n_genes: int, machine: dict[str, Any]) -> Setting:
    shape = config.model.width, config.model.blocks, config.model.heads, config.n_unmasked
    return Setting(
        is_goal_model=(*shape, n_genes) == (384, 6, 6, 1_024, 20_000), is_base_model=shape == (768, 12, 12, 2_048),
        has_bf16=machine["has_avx512_bf16"], gpu=machine["gpu"],
    )  # fmt: skip


def _about(corpus: Corpus) -> dict[str, Any]:
    n_samples = corpus.n_samples("train")
    return {
        "address": str(corpus.address), "samples": n_samples, "genes": len(corpus.vocabulary), "lanes": corpus.lanes,
        "nonzero": float(corpus.statistics.n_nonzero.sum()) / max(1, n_samples), "fingerprint": corpus.fingerprint,
    }  # fmt: skip
