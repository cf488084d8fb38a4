"""The configuration of a model and its training: the one home of every hyper-parameter and its default."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from txfm_data.config_tree import from_tree as config_from_dict
from txfm_data.config_tree import to_tree as config_to_dict

__all__ = [
    "LoopConfig",
    "LossConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
]


CHOICES = {
    "preprocessing": ("library_log1p", "log1p"),
    "activation": ("rect_tanh", "relu", "clamped_relu", "softmax"),
    "count_head": ("none", "nb", "zinb"),
    "kind": ("poisson", "mse", "smooth_l1", "nb", "zinb"),
    "reduction": ("mean", "sum"),
}


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and start of the network; the defaults are the tiny preset for a CPU."""

    width: int = 128
    """Width of every token, in components; also the width of an embedding."""
    blocks: int = 4
    """Transformer blocks of the encoder."""
    heads: int = 2
    """Attention heads; must divide width."""
    mlp_ratio: int = 4
    """Hidden width of the MLP in a block, in widths."""
    tokens: Literal["concat_project", "concat"] = "concat_project"
    """concat_project: codebook of full width, [E_g ; x_g] projected. concat: one narrower, no projection."""
    decoder_blocks: int = 4
    """Residual MLP blocks between CLS and the gene head; 0 is a linear decoder."""
    layerscale_init: float = 1e-4
    """Start of the per-channel weight of each residual branch."""
    stochastic_depth: float = 0.1
    """Chance that a branch of the last block is dropped for a sample; rises from 0 at the first block."""
    codebook_std: float = 0.02
    """Standard deviation of the codebook at the start; 0.5 lets runs of minutes tell genes apart sooner."""
    head_init: Literal["corpus_mean", "zero"] = "corpus_mean"
    """Start of the gene head: at the corpus mean of each gene (needed in short runs), or with a zero bias."""
    target_sum: float = 1e5
    """Library size that counts are scaled to before log1p, in counts."""
    preprocessing: Literal["library_log1p", "log1p"] = "library_log1p"
    """Value of a gene: ln(1 + target_sum x count / library size), or ln(1 + count) without scaling."""
    activation: Literal["rect_tanh", "relu", "clamped_relu", "softmax"] = "rect_tanh"
    """From logit to predicted log1p value. relu has no upper bound and may diverge."""
    tanh_scale: float | None = None
    """rect_tanh: what a logit is divided by before tanh. null is 4e; ln(1 + target_sum) gives slope 1 at 0."""
    count_head: Literal["none", "nb", "zinb"] = "none"
    """Parameters of count losses: a dispersion per gene (nb), and zero-inflation logits (zinb). loss.kind sets it."""

    def __post_init__(self) -> None:
        for name, value in (
            ("preprocessing", self.preprocessing),
            ("activation", self.activation),
            ("count_head", self.count_head),
        ):
            allowed = CHOICES[name]
            _require(value in allowed, f"model.{name}", f"one of {', '.join(allowed)}", value)
        if self.tanh_scale is not None:
            _require(
                _is_number(self.tanh_scale) and self.tanh_scale > 0,
                "model.tanh_scale",
                "null or above 0",
                self.tanh_scale,
            )
            _require(
                self.activation == "rect_tanh",
                "model.tanh_scale",
                f"null with activation {self.activation}",
                self.tanh_scale,
            )
        _require(self.width >= 2, "model.width", "at least 2", self.width)
        _require(self.blocks >= 1, "model.blocks", "at least 1", self.blocks)
        _require(
            self.heads >= 1 and self.width % self.heads == 0,
            "model.heads",
            f"a divisor of model.width {self.width}",
            self.heads,
        )
        _require(self.mlp_ratio >= 1, "model.mlp_ratio", "at least 1", self.mlp_ratio)
        _require(
            self.tokens in ("concat_project", "concat"),
            "model.tokens",
            "concat_project or concat",
            self.tokens,
        )
        _require(self.decoder_blocks >= 0, "model.decoder_blocks", "0 or more", self.decoder_blocks)
        _require(
            _is_number(self.layerscale_init) and self.layerscale_init > 0,
            "model.layerscale_init",
            "above 0",
            self.layerscale_init,
        )
        _require(
            _is_number(self.codebook_std) and self.codebook_std > 0, "model.codebook_std", "above 0", self.codebook_std
        )
        _require(0 <= self.stochastic_depth < 1, "model.stochastic_depth", "in [0, 1)", self.stochastic_depth)
        _require(
            self.head_init in ("corpus_mean", "zero"),
            "model.head_init",
            "corpus_mean or zero",
            self.head_init,
        )
        _require(
            _is_number(self.target_sum) and self.target_sum > 0,
            "model.target_sum",
            "above 0 counts",
            self.target_sum,
        )


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """What the encoder is shown of a sample."""

    n_unmasked: int = 2048
    """Genes shown to the encoder, drawn from the sample's panel; a smaller panel is shown whole."""
    temperature: float = 0.0
    """Weight of a gene in the draw is the number of training samples it was seen in to this power; 0 is uniform,
    above 0 shows frequent genes more often."""

    def __post_init__(self) -> None:
        _require(self.n_unmasked >= 1, "mask.n_unmasked", "at least 1 gene", self.n_unmasked)
        # The paper goes from -1 to 1. At 4 a gene seen twice as often weighs 16 times as much, and little is left to chance.
        _require(
            _is_number(self.temperature) and -4 <= self.temperature <= 4,
            "mask.temperature",
            "a number between -4 and 4",
            self.temperature,
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised, over the measured genes of each sample."""

    kind: Literal["poisson", "mse", "smooth_l1", "nb", "zinb"] = "poisson"
    """poisson, mse and smooth_l1 compare log1p values; nb and zinb are likelihoods of the raw counts."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the measured genes of a sample; samples are always averaged."""

    def __post_init__(self) -> None:
        for name, value in (("kind", self.kind), ("reduction", self.reduction)):
            _require(value in CHOICES[name], f"loss.{name}", f"one of {', '.join(CHOICES[name])}", value)

    @property
    def count_head(self) -> Literal["none", "nb", "zinb"]:
        """Parameters that the loss needs of the model, as `ModelConfig.count_head`."""
        return self.kind if self.kind in ("nb", "zinb") else "none"

    @property
    def needs_counts(self) -> bool:
        """Whether the loss is computed from raw counts."""
        return self.count_head != "none"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its one-cycle cosine schedule; momentum is not cycled."""

    lr: float = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.999
    """AdamW: decay of the mean of squared gradients."""
    eps: float = 1e-6
    """AdamW: added to the root of the mean squared gradient."""
    warmup_fraction: float = 0.1
    """Share of all steps in which the learning rate rises."""
    div_factor: float = 25.0
    """The first learning rate is lr / div_factor."""
    final_div_factor: float = 1e4
    """The last learning rate is the first one / final_div_factor."""
    weight_decay: float | None = None
    """Weight decay of matrices and codebook; null takes 1 / (lr x steps)."""
    clip_norm: float | None = None
    """Gradients are scaled down to this norm, over all parameters; null does not clip."""

    def __post_init__(self) -> None:
        _require(_is_number(self.lr) and self.lr > 0, "optim.lr", "above 0", self.lr)
        _require(0 <= self.beta1 < 1, "optim.beta1", "in [0, 1)", self.beta1)
        _require(0 <= self.beta2 < 1, "optim.beta2", "in [0, 1)", self.beta2)
        _require(_is_number(self.eps) and self.eps > 0, "optim.eps", "above 0", self.eps)
        _require(0 <= self.warmup_fraction < 1, "optim.warmup_fraction", "in [0, 1)", self.warmup_fraction)
        _require(
            _is_number(self.div_factor) and self.div_factor >= 1,
            "optim.div_factor",
            "1 or more",
            self.div_factor,
        )
        _require(
            _is_number(self.final_div_factor) and self.final_div_factor >= 1,
            "optim.final_div_factor",
            "1 or more",
            self.final_div_factor,
        )
        if self.weight_decay is not None:
            _require(
                _is_number(self.weight_decay) and self.weight_decay >= 0,
                "optim.weight_decay",
                "null, or 0 or more",
                self.weight_decay,
            )
        if self.clip_norm is not None:
            _require(
                _is_number(self.clip_norm) and self.clip_norm > 0, "optim.clip_norm", "null or above 0", self.clip_norm
            )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length, batch and reporting of a training run."""

    steps: int | None = None
    """Optimizer steps in all; give this or epochs."""
    epochs: float | None = None
    """Passes over the train split; give this or steps. The last incomplete batch of a pass is dropped."""
    global_batch: int = 64
    """Samples of one step over all processes; the lanes of the shards must divide it."""
    accumulation: int = 1
    """Parts in which each process computes its share of a step, one after the other: less memory, same result."""
    seed: int = 0
    """Seed of the start, of the order of samples, of the masks and of stochastic depth."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """bf16 autocast or none; auto takes bf16 on a GPU that has it, or where accelerate launch asks for it."""
    validate_every: int = 500
    """Steps between validations; there is always one at the end."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    num_processes_expected: int | None = None
    """Processes that the launcher was asked for; fewer give a warning."""
    cpu_threads: int | None = None
    """PyTorch threads in each process; null leaves the default, or shares the cores among CPU processes."""
    checkpoint_every: int | None = 1000
    """Steps between checkpoints to resume from; null writes them only when the run is told to stop."""
    keep_checkpoints: int = 2
    """Checkpoints kept; the oldest is removed after a newer one was written and read back."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass in place of keeping its states: less memory, about a third more work."""
    compile: bool = False
    """Compile the model with torch.compile; the first step takes minutes."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"loop.steps {self.steps} and loop.epochs {self.epochs} are both given; "
                f"set one to null (--loop.steps null or --loop.epochs null)"
            )
        _require(self.steps is None or self.steps >= 1, "loop.steps", "at least 1", self.steps)
        _require(
            self.epochs is None or (_is_number(self.epochs) and self.epochs > 0),
            "loop.epochs",
            "above 0",
            self.epochs,
        )
        _require(self.global_batch >= 1, "loop.global_batch", "at least 1 sample", self.global_batch)
        _require(self.accumulation >= 1, "loop.accumulation", "at least 1 part", self.accumulation)
        _require(self.keep_checkpoints >= 1, "loop.keep_checkpoints", "at least 1", self.keep_checkpoints)
        _require(0 <= self.seed < 2**32, "loop.seed", "in [0, 2^32)", self.seed)
        _require(self.precision in ("auto", "bf16", "no"), "loop.precision", "auto, bf16 or no", self.precision)
        _require(self.validate_every >= 1, "loop.validate_every", "at least 1 step", self.validate_every)
        _require(self.log_every >= 1, "loop.log_every", "at least 1 step", self.log_every)
        for name, value in (
            ("num_processes_expected", self.num_processes_expected),
            ("checkpoint_every", self.checkpoint_every),
            ("cpu_threads", self.cpu_threads),
        ):
            _require(value is None or value >= 1, f"loop.{name}", "null or at least 1", value)

    def total_steps(self, batches_in_epoch: Callable[[int], int], *, is_weighted: bool) -> int:
        """Optimizer steps of a run.

        Parameters
        ----------
        batches_in_epoch
            Global batches of an epoch of the corpus.
        is_weighted
            Whether datasets have weights, so that epochs differ in length.
        """
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ValueError("give the length of the run: loop.steps or loop.epochs")
        if not is_weighted:
            return max(1, round(self.epochs * batches_in_epoch(0)))
        whole = int(self.epochs)
        batches = float(sum(map(batches_in_epoch, range(whole))))
        if self.epochs > whole:
            batches += (self.epochs - whole) * batches_in_epoch(whole)
        return max(1, round(batches))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train TxFM on a shard corpus."""

    shards: str
    """Shard corpus to train on: a folder written by `txfm shard`."""
    out: str
    """Folder of the run: metrics, checkpoints to resume from and, at the end, the checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    init: str | None = None
    """Checkpoint to start from in place of random weights: shared genes keep their rows, new genes get fresh ones. A run that
    is resumed names the same again, and its own checkpoint goes before this."""
    resume: str | None = None
    """auto goes on from the newest sound checkpoint in `out`, or starts if there is none; or the folder of one."""
    dry_run: bool = False
    """Print steps, tokens, work, memory and estimated hours; train nothing and write nothing."""

    def __post_init__(self) -> None:
        needed = self.loss.count_head
        if self.model.count_head not in ("none", needed):
            raise ValueError(
                f"model.count_head is {self.model.count_head}, loss.kind {self.loss.kind} needs {needed}; "
                f"leave model.count_head out"
            )
        object.__setattr__(self, "model", replace(self.model, count_head=needed))
        _require(bool(self.shards), "shards", "the path of a shard corpus", self.shards)
        _require(bool(self.out), "out", "the path of a folder", self.out)
        if self.loop.steps is None and self.loop.epochs is None:
            raise ValueError("give the length of the run: loop.steps or loop.epochs")
