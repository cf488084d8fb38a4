"""What the numbers of `txfm bench train` ought to be, and whether they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from shards.bench.goals import Goal


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row. samples_per_s : of each round.  matmul_share : of the median rate.  wait_share : of its time.

    peak_bytes : None where it was not measured.
    """

    samples_per_s: tuple[float, ...]
    matmul_share: float
    wait_share: float
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides which goals there are.

    is_goal_model : width 384, 6 blocks, K 1,024, G 20,000.  is_base_model : TxFM-B, K 2,048.  has_bf16 : a CPU with AVX512-BF16.
    gpu : name of the GPU, or nothing.
    """

    is_goal_model: bool
    is_base_model: bool
    has_bf16: bool
    gpu: str


def goals(rows: Mapping[str, Measured], missing: Mapping[str, str], setting: Setting) -> list[Goal]:
    """All goals. `missing` says of each row that was not measured why."""
    is_cpu = not setting.gpu
    not_here = "" if is_cpu and setting.is_goal_model else "for a CPU, width 384, 6 blocks, K 1,024, G 20,000"
    no_bf16 = not_here or ("" if setting.has_bf16 else "for a CPU with AVX512-BF16")

    def ratio(name: str, about: str, ours: str, theirs: str, least: float | None, why: str = "") -> Goal:
        lacking = [missing.get(row, "it was not run") for row in (ours, theirs) if row not in rows]
        value = None if lacking else paired(rows[ours].samples_per_s, rows[theirs].samples_per_s)
        return Goal(name=name, about=about, value=value, goal=None if why else least, why=(lacking or [why])[0])

    return [
        ratio("fast_to_plain", "fast / plain, float32", "fast_float32", "plain_float32", 1.12, not_here),
        ratio("bf16_to_plain", "fast bf16 / plain float32", "fast_bf16", "plain_float32", 1.5, no_bf16),
        ratio("bf16_to_plain_bf16", "fast / plain, bf16", "fast_bf16", "plain_bf16", None),
        _memory(rows, missing, "float32"),
        _memory(rows, missing, "bf16"),
        _wait(rows, missing),
        *_gpu(rows, missing, setting),
    ]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round: what slows the machine for a while strikes both."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _memory(rows: Mapping[str, Measured], missing: Mapping[str, str], kind: str) -> Goal:
    peaks = [rows[f"{form}_{kind}"].peak_bytes if f"{form}_{kind}" in rows else None for form in ("fast", "plain")]
    value = peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None
    why = next((missing[row] for row in (f"fast_{kind}", f"plain_{kind}") if row in missing), "memory was not measured")
    return Goal(
        name=f"memory_{kind}", about=f"peak memory, fast / plain, {kind}", value=value, goal=0.999, is_least=False,
        why="" if value is not None else why,
    )  # fmt: skip


def _wait(rows: Mapping[str, Measured], missing: Mapping[str, str]) -> Goal:
    name = next((row for row in ("fast_bf16", "fast_float32") if row in rows), None)
    value = None if name is None else 100 * rows[name].wait_share
    return Goal(
        name="data_wait", about="time waiting for data, fast", value=value, unit="%", goal=2, is_least=False,
        why="" if name else missing.get("fast_bf16", "it was not run"),
    )  # fmt: skip


def _gpu(rows: Mapping[str, Measured], missing: Mapping[str, str], setting: Setting) -> list[Goal]:
    names = [name for name in ("fast_bf16_compiled", "fast_bf16") if name in rows]
    best = max(names, key=lambda name: median(rows[name].samples_per_s), default=None)
    why = "no H100 or H200"
    if setting.gpu and not setting.is_base_model:
        why = "for TxFM-B, K 2,048"
    elif setting.gpu and best is None:
        why = missing.get("fast_bf16", "it was not run")
    is_there = bool(setting.gpu) and setting.is_base_model and best is not None
    is_class = any(name in setting.gpu for name in ("H100", "H200"))
    rate = median(rows[best].samples_per_s) if is_there and best else None
    share = 100 * rows[best].matmul_share if is_there and best else None
    return [
        Goal(
            name="gpu_rate", about="TxFM-B, K 2,048, bf16, one GPU", value=rate, unit="samples/s",
            goal=277 if is_class or not is_there else None, why="" if is_there and is_class else why,
        ),
        Goal(
            name="gpu_share", about="  of its matmul rate", value=share, unit="%", goal=45 if is_class or not is_there else None,
            why="" if is_there and is_class else why,
        ),
    ]  # fmt: skip
