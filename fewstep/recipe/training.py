"""How the trainer runs: a recipe's `train`."""

from __future__ import annotations

from typing import Literal

from fewstep.config import config

MOST_BATCH = 1 << 20


@config
class Train:
    """How the trainer runs."""

    steps: int = 1000
    """Student updates (published counts of critic iterations are converted)."""
    batch: int = 128
    """Student samples of one update, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches per update and process; must divide the process's share of the batch."""
    clip: float = 10.0
    """Largest gradient norm of a turn."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs networks under autocast; weights, moments and averages stay fp32."""
    seed: int = 0
    """Of initial weights and of every random number of the run."""
    ema: tuple[float, ...] = (0.999,)
    """Decays of the averages of the student that are kept; the first one is sampled, evaluated and exported."""
    ema_warmup: float = 10.0
    """w of min(decay, (1 + n) / (w + n)) after n updates; 3 and a decay near 1 average the last n / 2 of them."""
    product: Literal["ema", "student"] = "ema"
    """Which weights are sampled, evaluated and exported."""
    max_skips: int = 10
    """Non-finite updates in a row after which the run stops."""
    checkpointing: bool = False
    """Activation checkpointing in every diffusers model."""
    offload: bool = False
    """Roles that a turn does not call, and moments that do not step, wait in main memory."""
    compile: tuple[str, ...] = ()
    """Roles whose networks go through torch.compile; an adapter's is the role that holds its weights."""
    channels_last: bool = False
    """Convolution weights with the channels innermost."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: every one holds everything, or the networks are sharded over them (FSDP2)."""
    attention: Literal["auto", "reference", "chunked", "triton", "sdpa", "xformers"] = "auto"
    """Attention while training: auto gives calls with tangents to fewstep.kernels and leaves the rest to torch."""
    log_every: int = 10
    """Updates between records in log.jsonl; a sudden change of samples (`guard`) has one of its own."""
    sample_every: int = 100
    """Steps between sample grids; 0 for none."""
    eval_every: int = 0
    """Steps between evaluations; 0 for the end only."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the end always makes one."""
    keep: int = 2
    """Newest checkpoints kept; the stage's best one stays too (`guard`)."""
    guard: Literal["off", "warn", "stop", "restore"] = "warn"
    """What an alarm on samples or refused updates does (`fewstep health` names them): off takes no readings, warn prints
    a line, stop ends the run with a checkpoint, restore goes back to the stage's best checkpoint with a quarter of
    the student's rate, twice before it stops there."""
    readings_every: int = 10
    """Updates between readings of samples against the teacher's, or the data's; with samplers of more than four calls
    they are rarer. Reported as `samples/` in log.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the records go beside log.jsonl."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep",
            "max_skips",
            "readings_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch > MOST_BATCH:
            raise ValueError(f"batch must be at most {MOST_BATCH}, not {self.batch}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} must divide batch {self.batch}")
        if self.clip <= 0:
            raise ValueError(f"clip must be positive, not {self.clip}")
        for name in ("sample_every", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if any(not 0 <= d < 1 for d in self.ema):
            raise ValueError(f"ema decays must lie in [0, 1), not {list(self.ema)}")
        if not self.ema_warmup > 1:
            raise ValueError(f"ema_warmup must be greater than 1, not {self.ema_warmup}")
        if len(set(self.ema)) < len(self.ema):
            raise ValueError(f"ema decays must differ, not {list(self.ema)}")
