"""The recipe: the one dataclass in which all parts of a run meet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

from pydantic import Field

import fewstep.data
import fewstep.methods
import fewstep.networks.bridged
import fewstep.networks.control
import fewstep.networks.controlnet
import fewstep.networks.dit1d
import fewstep.networks.get
import fewstep.networks.perceptual
import fewstep.networks.pruned
import fewstep.networks.reward_model
import fewstep.networks.rewards
import fewstep.networks.routed
import fewstep.networks.specs
import fewstep.networks.teachers  # noqa: F401  registers networks and teachers
from fewstep.algebra.bridge import Bridge
from fewstep.algebra.process import Process
from fewstep.algebra.sampling import Sampler
from fewstep.algebra.views import ViewPart
from fewstep.config import RecipeError, Source, _close, config
from fewstep.data.base import Conditions, DataPart
from fewstep.eval.protocol.preset import preset_names
from fewstep.methods.gan import Gan
from fewstep.methods.method import MethodPart
from fewstep.networks.assisted import AssistPart
from fewstep.networks.declared import declared_inputs, declared_process
from fewstep.networks.parts import NetworkPart, TeacherPart
from fewstep.networks.routed import innermost
from fewstep.networks.specs import DiscriminatorSpec
from fewstep.recipe.expected import Expected
from fewstep.recipe.faults import refuse
from fewstep.recipe.success import parse
from fewstep.recipe.training import Train


@config
class AdamW:
    """AdamW, or CAME in its place, and the learning-rate schedule of one role."""

    lr: float
    """Learning rate."""
    rule: Literal["adamw", "came"] = "adamw"
    """came: CAME (arXiv 2307.02047), whose second moments are factored, of the package pytorch-optimizer; SANA-Sprint's.
    It has a third beta .9999 and eps 1e-30 and 1e-16, the values of paper and SANA."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment; papers that sum a loss over elements need it divided by their number
    here."""
    weight_decay: float = 0.0
    """Decoupled weight decay, which is multiplied by the rate."""
    warmup: int = 0
    """Updates over which the rate rises linearly from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls to 0 over the stage's updates."""
    bits: Literal[32, 8] = 32
    """Of Adam's moments; 8 needs bitsandbytes."""

    def __post_init__(self) -> None:
        if self.rule == "came" and (self.eps, self.bits) != (1e-8, 32):
            raise ValueError("rule came has two eps of its own and no 8-bit form; leave eps and bits out")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, not {self.lr}")
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, not {self.eps}")
        if any(not 0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {list(self.betas)}")
        for name in ("weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


@config
class Stage:
    """One part of a run: a method for so many steps."""

    method: MethodPart
    """What trains in the stage."""
    steps: int
    """Student updates."""
    copy: dict[str, str] = Field(default_factory=dict)
    """Weights to copy at the start of the stage, target role: source role."""
    rates: dict[str, float] = Field(default_factory=dict)
    """Learning rates of roles while the stage lasts, in place of `optim.*.lr`; warm-up, decay and the rest stay."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        for role, rate in self.rates.items():
            if rate <= 0:
                raise ValueError(f"rates.{role}: must be positive, not {rate}")


SAMPLES = 1797
"""Of a measurement for which no number was given: as many as scikit-learn has digits."""
MOST_SAMPLES = 10_000_000
"""Of one measurement; published ones have 50,000."""
MOST_STEPS = 10_000
"""Of the longest sampler that is made; a table of noise levels has 1000."""
FEATURES = ("effnet-lite0", "inception", "dinov2", "clip", "house")


def default_metric(data: Any) -> str | None:
    """The metric of data for which none was chosen; None where somebody has to choose."""
    if data.name == "degraded":
        return "paired-house-digits" if data.of.name == "digits" else default_metric(data.of)
    own = {"digits": "fd-house-digits", "helices": "chains", "voxel-digits": "voxels"}
    if data.name in own:
        return own[data.name]
    return "fd" if getattr(data, "grey", True) is False or data.name == "latents" else None


@config
class Evaluate:
    """What is measured at the end of a run, and how many samples."""

    metric: str | None = None
    """A preset of `fewstep eval`: fd (Frechet distance, KID, precision and recall on the features that `features` names,
    from what `against` names), fd-house-digits and fd-house-fashion-mnist (on a house classifier's features),
    fd-effnet-lite0, energy (energy distance of vectors), chains (of points in space), voxels (of solids), another shipped
    one, or a YAML file. Left out: the digits' for digits, fd for colour pictures."""
    against: str = "data"
    """Of metric fd: data (the recipe's own, what `held_out` keeps from training where it is set), a folder of real
    pictures of any size, or a statistics file (.npz)."""
    features: str = "effnet-lite0"
    """Of metric fd: effnet-lite0, inception, dinov2, clip or clip:ARCHITECTURE, house."""
    extractor_path: str | None = None
    """Weights of these features, where they do not come with a package."""
    samples: int | None = None
    """In place of the preset's number. Left out: 1797, or as many as there are held-out pictures where a metric compares
    with these (paired-house-digits); more than these are refused."""
    seed: int = 1000
    """In place of the preset's first seed."""
    teacher_steps: tuple[int, ...] = (1, 8, 16, 32)
    """Heun steps at which the teacher is measured."""
    teacher_grid: Literal["even", "own"] = "even"
    """Where these stand: even in u, as a student's, or own: where the teacher's own pipeline calls its network (Karras's
    levels, shift_terminal and the like), of a diffusers folder."""
    guidance: float = 1.0
    """Guidance scale at which the teacher is measured; 1 is none."""
    fitted: bool | None = None
    """Measure also the frozen teacher under a sampler fitted, without training, for the student's number of calls, of
    two at least (`fewstep fit`). Left out: where fitting takes under 5 % of the training's network calls."""
    assist: AssistPart | None = None
    """Help at sampling, with which the student is measured as well: distillation_pp, diversity, adaptive by its teacher,
    nasa by a negative prompt."""
    views: tuple[ViewPart, ...] = ()
    """Samples are measured through these, one after the other: [{name: mirror}, {name: negative}] of a student of both.
    They hold for every row, the teacher's too."""
    retrieval: str | None = None
    """Folder of a model by `fewstep train-retrieval`: also the share of captions found among 100."""

    def __post_init__(self) -> None:
        own = (self.against, self.features, self.extractor_path) != ("data", "effnet-lite0", None)
        if self.metric is None and own:
            object.__setattr__(self, "metric", "fd")
        if self.metric not in (None, "fd") and own:
            raise ValueError(f"against, features and extractor_path are of metric fd, not of {self.metric}")
        if self.features not in FEATURES and not self.features.startswith("clip:"):
            raise ValueError(f"features {self.features!r} is not one of {', '.join(FEATURES)}, clip:ARCHITECTURE")
        if self.metric and not self.metric.endswith((".yaml", ".yml")) and self.metric not in preset_names():
            known = preset_names()
            hint = _close(self.metric, known) or f"; shipped are {', '.join(known)}"
            raise ValueError(f"metric {self.metric!r} is no preset and no YAML file{hint}")
        if self.number < 2:
            raise ValueError(f"samples must be at least 2, not {self.samples}")
        if self.number > MOST_SAMPLES:
            raise ValueError(f"samples must be at most {MOST_SAMPLES}, not {self.samples}")
        if any(n < 1 for n in self.teacher_steps):
            raise ValueError(f"teacher_steps must be at least 1, not {list(self.teacher_steps)}")
        if any(n > MOST_STEPS for n in self.teacher_steps):
            raise ValueError(f"teacher_steps must be at most {MOST_STEPS}, not {list(self.teacher_steps)}")

    @property
    def number(self) -> int:
        """How many are measured, where no metric compares with held-out pictures."""
        return SAMPLES if self.samples is None else self.samples


@config
class Result:
    """A number that belongs to a recipe."""

    metric: str
    """What was measured."""
    value: float
    """The number."""
    samples: int
    """Samples that it was measured on."""
    source: Literal["measured", "paper"]
    """A run of this code, or the paper."""
    note: str = ""
    """What else one must know to compare it."""


@config
class Recipe:
    """A run as data.

    >>> recipe = fewstep.load("digits-dmd2")
    >>> recipe.about
    'one-step DMD2 student of the digits teacher'
    >>> recipe.method.name, recipe.train.steps, recipe.optimizer("critic").lr
    ('dmd2', 700, 0.001)
    """

    about: str
    """What the recipe makes, in one line."""
    data: DataPart
    """Where samples, conditions and their shape come from."""
    student: NetworkPart
    """The network that is trained, sampled and exported."""
    teacher: TeacherPart | None = None
    """The frozen network that the student learns from; null for methods that learn from data alone."""
    critic: NetworkPart | None = None
    """The network that denoises the student's samples (fake score), for methods that match scores or have a
    discriminator."""
    discriminator: DiscriminatorSpec | None = None
    """Heads on a network's features, for methods with a GAN."""
    roles: dict[str, NetworkPart] = Field(default_factory=dict)
    """Further roles by name, built after the student (target networks, experts, a reverse student) but for the one that
    it copies."""
    method: MethodPart
    """How the student is trained; the keys are the paper's hyper-parameters."""
    before: tuple[Stage, ...] = ()
    """Stages that run before the method."""
    copy: dict[str, str] = Field(default_factory=dict)
    """Weights to copy when the method starts, after the stages before: target role: source role."""
    optim: dict[str, AdamW]
    """Per role; `default` stands for every role that is not named."""
    train: Train = Train()
    """Length, batch, averages, precision and records of the run."""
    evaluate: Evaluate | None = Evaluate()
    """What is measured at the end; null measures nothing."""
    success: str | None = None
    """When the run has succeeded, METRIC <= NUMBER or METRIC >= NUMBER, such as fd <= 1.5 or class accuracy >= 0.98; it
    says at its end whether it has."""
    expected: Expected | None = None
    """Bands of losses and readings of reference runs: `fewstep recipes expect` writes them, `fewstep health` compares."""
    results: tuple[Result, ...] = ()
    """Numbers that are known of this very recipe."""

    def __post_init__(self) -> None:
        if self.evaluate is not None and self.evaluate.metric is None:
            object.__setattr__(self, "evaluate", replace(self.evaluate, metric=default_metric(self.data)))
        for role in self.roles:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", role) or role.startswith("ema_"):
                raise ValueError(
                    f"roles: {role!r} cannot name a file; a role's name has letters, digits and _, begins with no digit "
                    "and not with ema_, and has at most 64"
                )
        taken = sorted({"teacher", "student", "critic", "discriminator", "state"} & set(self.roles))
        if taken:
            raise ValueError(f"roles: {taken[0]!r} has a meaning of its own; choose another name")
        if self.success is not None:
            parse(self.success)
            if self.evaluate is None:
                raise ValueError(f"success: {self.success} needs a measurement, and evaluate is null")
        refuse(self)
        have = set(self.role_names())
        for number, stage in enumerate(self.stages()):
            missing = sorted(stage.method.needs().roles - have)
            if missing:
                name = stage.method.name
                raise ValueError(f"method {name} needs the role{'s' * (len(missing) > 1)} {', '.join(missing)}")
            inputs, key = declared_inputs(self.student, "student", self._specs())
            if wrong := stage.method.needs().refuses_inputs(inputs):
                raise ValueError(f"{key}: method {stage.method.name} {wrong}")
            if self.data.conditions and (wrong := stage.method.needs().refuses_conditions(self.data.conditions)):
                raise ValueError(f"data: method {stage.method.name} {wrong}")
            trunk = self.discriminator.trunk if self.discriminator else "critic"
            if trunk != "critic" and any(gan.shares_noise for gan in _gans(stage.method)):
                raise ValueError(
                    f"discriminator.trunk: {trunk!r} will not do where gan.shares_noise judges student samples on the "
                    "critic's features; use critic, or leave shares_noise out"
                )
            trained = sorted(stage.method.needs().trained)
            for role in trained:
                if role not in self.optim and "default" not in self.optim:
                    raise ValueError(f"optim has no entry for {role} and no default")
            for role in stage.rates:
                if role not in trained:
                    hint = f"method {stage.method.name} trains {', '.join(trained)}{_close(role, trained)}"
                    raise ValueError(f"before.{number}.rates.{role}: {hint}")
            for target, source in stage.copy.items():
                for role in (target, source):
                    if role not in have:
                        raise ValueError(f"copy: role {role!r} is not in this recipe; it has {', '.join(sorted(have))}")
                if target == "teacher" and self._adapters_on_teacher():
                    raise ValueError(
                        f"copy: {self._adapters_on_teacher()[0]} is an adapter on the teacher's weights, which "
                        "therefore cannot be overwritten"
                    )
        self._check_processes()
        unknown = sorted(set(self.optim) - have - {"default"})
        if unknown:
            hint = _close(unknown[0], have) or f"; it has {', '.join(sorted(have))}"
            raise ValueError(f"optim.{unknown[0]}: no such role{hint}")

    def _check_processes(self) -> None:
        specs = self._specs()
        declared = {role: declared_process(spec, role, specs) for role, spec in specs.items()}
        own, _ = declared["student"]
        if own is None:
            return
        self.check_process(own)
        for process, key in declared.values():
            if process not in (None, own):
                raise RecipeError(f"{key}: {process} differs from the student's, {own}; use the same")

    def check_process(self, process: Process, source: Source | None = None) -> None:
        """RecipeError unless every stage's method can train a student of this process.

        It names the key that sets the process, and with `source` the file and line where that stands.
        """
        if self.evaluate is not None and self.evaluate.fitted and isinstance(process, Bridge):
            raise RecipeError("evaluate.fitted: no sampler is fitted to a bridge's teacher; leave it out")
        for stage in self.stages():
            sampler = stage.method.sampler()
            ways = [steps for steps in (sampler.steps, *sampler.lists) if len(steps) > 1 and steps[0] == 1]
            noiseless = sampler.kind in ("map", "gamma") and ways
            if noiseless and isinstance(process, Bridge):
                raise RecipeError(
                    f"method: its steps {list(ways[0])} begin at 1, where a bridge is its source, and a sampler of "
                    f"kind {sampler.kind} has no direction to go; begin below 1, such as at 0.9, or re-noise"
                )
            if wrong := stage.method.needs().refuses_process(process):
                _, key = declared_process(self.student, "student", self._specs())
                where = f"{source.where(tuple(key.split('.')))}: " if source else ""
                raise RecipeError(f"{where}{key}: method {stage.method.name} {wrong}")

    def check_conditions(self, conditions: Conditions) -> None:
        """RecipeError unless every stage's method trains on data with these conditions, where its files tell them."""
        for stage in self.stages():
            if wrong := stage.method.needs().refuses_conditions(conditions):
                raise RecipeError(f"data: method {stage.method.name} {wrong}")

    def stages(self) -> tuple[Stage, ...]:
        """All stages in order; the last one is the recipe's method."""
        return (*self.before, Stage(method=self.method, steps=self.train.steps, copy=self.copy))

    def role_names(self) -> list[str]:
        """Roles in building order; what a role copies comes before it."""
        inner = innermost(self.student)
        first = [r for r in self.roles if r in (getattr(inner, "of", None), *getattr(inner, "beside", ()))]
        fixed = ("teacher", *first, "student", *(r for r in self.roles if r not in first), "critic", "discriminator")
        return [r for r in fixed if r in self.roles or getattr(self, r, None) is not None]

    def shown_guidance(self) -> float:
        """The scale at which its teacher is measured and shown."""
        return self.evaluate.guidance if self.evaluate is not None else 1.0

    def fills_teacher(self) -> bool:
        """True when the teacher has no weights but those that a stage of this recipe gives it."""
        return self.teacher is not None and self.teacher.name == "network"

    def overwrites_teacher(self) -> bool:
        """True when a stage copies into the teacher (progressive distillation in place): it is saved as well."""
        return any("teacher" in stage.copy for stage in self.stages())

    def _adapters_on_teacher(self) -> list[str]:
        return [
            n for n, s in self._specs().items() if getattr(s, "name", "") in ("controlnet", "lora") and s.of == "teacher"
        ]

    def _specs(self) -> dict[str, Any]:
        return {role: self.spec(role) for role in self.role_names()}

    def spec(self, role: str) -> Any:
        """The spec that builds a role."""
        return self.roles[role] if role in self.roles else getattr(self, role)

    def optimizer(self, role: str, stage: Stage | None = None) -> AdamW:
        """The rule of a role; in a stage, with the stage's own rate."""
        spec = self.optim.get(role) or self.optim["default"]
        return replace(spec, lr=stage.rates[role]) if stage is not None and role in stage.rates else spec

    def sampler(self) -> Sampler:
        """How the product is sampled."""
        return self.method.sampler()


def _gans(part: Any) -> Iterator[Gan]:
    """The discriminators' settings of a method, those of methods inside it too."""
    values = [getattr(part, f.name) for f in fields(part)] if is_dataclass(part) else part
    for value in values if isinstance(values, list | tuple) else ():
        if isinstance(value, Gan):
            yield value
        elif is_dataclass(value) or isinstance(value, tuple):
            yield from _gans(value)
