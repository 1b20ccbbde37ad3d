"""Training under a budget of updates, seconds or network calls, with an account that survives a restart."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.algebra.sampling import Sampler
from fewstep.commands.compare.spent import Spent, account_of, peak_memory, spent_of
from fewstep.config import UserError, plain
from fewstep.eval.features.base import state_sha256
from fewstep.files import atomic_path, parse_json
from fewstep.methods.pairs import Pairs
from fewstep.networks.analytic import Mixture
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.roles import Roles
from fewstep.recipe.schema import Recipe, Stage
from fewstep.train.trainer import Hooks, Trainer

PROBE = 5
"""Steps of each stage that are taken to learn what one costs; the first is not counted among them."""


@dataclass(frozen=True)
class Budget:
    """What a run may spend.

    own: each recipe's own steps. updates: student updates over all stages that train the student. seconds: wall time of
    training, checkpoints included. calls: forward passes of any role's network, one per sample; see `Calls`.
    """

    kind: Literal["own", "updates", "seconds", "calls"]
    amount: float
    """Endless for own."""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`own`, `updates=500`, `seconds=60` or `calls=1e6`; UserError says what is allowed."""
        if text == "own":
            return cls("own", math.inf)
        kind, _, number = text.partition("=")
        try:
            amount = float(number)
        except ValueError:
            amount = math.nan
        if kind not in ("updates", "seconds", "calls") or not 0 < amount < math.inf:
            raise UserError(f"--budget {text!r}: expected own, or updates=N, seconds=S or calls=C with a positive number")
        if kind == "updates" and (amount < 1 or amount != int(amount)):
            raise UserError(f"--budget {text!r}: updates must be a whole number")
        return cls(kind, amount)  # type: ignore[arg-type]

    @property
    def in_steps(self) -> bool:
        """Lengths are known before anything has run."""
        return self.kind in ("own", "updates")

    def __str__(self) -> str:
        if self.kind == "own":
            return "the recipe's own updates"
        return f"{self.amount:,.10g} {'network calls' if self.kind == 'calls' else self.kind}"


class BudgetSpent(Exception):
    """The budget is used up; a checkpoint has been written."""


class Calls:
    """Counts the work of networks in forward passes of one sample.

    A forward pass counts 1 per sample, its backward pass 2 (1 where only the input needs a gradient, as through a
    frozen teacher), a forward-mode derivative 1 more. Heads and loss weights are not counted. Shared networks
    count once: an adapter's calls are those of its base.
    """

    def __init__(self, roles: Iterable[nn.Module]) -> None:
        self.total = 0
        for network in _networks(roles):
            # A function, not a bound method: deepcopy of a network would copy this object along.
            network.register_forward_hook(lambda module, args, out: self._seen(module, args[0], out))

    def _seen(self, network: nn.Module, x: Tensor, out: Any) -> None:
        raw, features = out if isinstance(out, tuple) else (out.x0, {})
        found = [t for t in (raw, *features.values()) if isinstance(t, Tensor)]
        rows = len(x)
        dual = any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in found)
        self.total += 2 * rows if dual else rows
        live = [t for t in found if t.requires_grad] if torch.is_grad_enabled() else []
        if not live:
            return
        backward = rows * (2 if any(p.requires_grad for p in network.parameters()) else 1)
        if dual:
            self.total += backward  # wrapped tensors take no hooks
            return
        counted = False

        def count(_: Tensor) -> None:
            nonlocal counted
            self.total += 0 if counted else backward
            counted = True

        for tensor in live:
            tensor.register_hook(count)


def _networks(roles: Iterable[nn.Module]) -> list[nn.Module]:
    """The networks inside denoisers, and exact denoisers, each once."""
    inside = chain.from_iterable(role.modules() for role in roles)
    found = [m.net if isinstance(m, Denoiser) else m for m in inside if isinstance(m, Denoiser | Mixture)]
    return list({id(m): m for m in found}.values())


def counted(recipe: Recipe) -> list[bool]:
    """Per stage, whether it trains the student and so counts as student updates."""
    return ["student" in stage.method.needs().trained for stage in recipe.stages()]


def with_lengths(recipe: Recipe, steps: Sequence[int]) -> Recipe:
    """The recipe with these steps per stage; curricula that are given in steps keep their share of the stage."""
    stages = [_resized(stage, n) for stage, n in zip(recipe.stages(), steps, strict=True)]
    last = stages[-1]
    return replace(
        recipe,
        before=tuple(stages[:-1]),
        method=last.method,
        train=replace(recipe.train, steps=last.steps),
    )


def _resized(stage: Stage, steps: int) -> Stage:
    method: Any = stage.method
    pairing = getattr(method, "pairing", None)
    for name in ("total", "stage_steps"):
        if pairing is not None and hasattr(pairing, name):
            length = max(1, round(getattr(pairing, name) * steps / stage.steps))
            method = replace(method, pairing=replace(pairing, **{name: length}))
    return replace(stage, method=method, steps=steps)


def lengths(recipe: Recipe, budget: Budget, costs: Sequence[tuple[float, float]] = ()) -> list[int]:
    """Steps per stage that spend the budget, the stages in the recipe's proportions.

    Args:
        costs: per stage, what its first step costs and what each further one does, in the budget's unit; needed
            for seconds and calls.

    Raises UserError when the budget does not reach through every stage.
    """
    planned = [stage.steps for stage in recipe.stages()]
    if budget.kind == "own":
        return planned
    if budget.kind == "updates":
        total = sum(n for n, counts in zip(planned, counted(recipe), strict=True) if counts)
        if budget.amount < sum(counted(recipe)):
            raise UserError(f"{budget} are fewer than this recipe has stages that train the student")
        steps = [max(1, round(n * budget.amount / total)) for n in planned]
        # Rounding of the earlier stages is taken up by the last, so that the sum is exact.
        others = sum(n for n, counts in zip(steps[:-1], counted(recipe), strict=False) if counts)
        return [*steps[:-1], max(1, int(budget.amount) - others)]
    first = sum(a for a, _ in costs)
    further = sum(b * (n - 1) for (_, b), n in zip(costs, planned, strict=True))
    if budget.amount <= first:
        raise UserError(f"a budget of {budget} ends before each stage has taken one step ({first:.3g} needed)")
    share = (budget.amount - first) / max(further, 1e-12)
    return [1 + round((n - 1) * share) for n in planned]


class Accounted:
    """A trainer whose account is kept, and that ends with a checkpoint when the budget is spent.

    Args:
        banks: folder in which banks of teacher pairs are kept, shared by all runs; None keeps none. What a bank
            cost to make is charged to every run that uses it.
        watch: called after every step.

    The account is one JSON object a checkpoint in RUN/account.jsonl, so that a continued run goes on from it.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path | None,
        budget: Budget | None = None,
        *,
        banks: Path | None = None,
        watch: Callable[[Accounted], None] | None = None,
    ) -> None:
        hooks = Hooks(on_step=self._stepped, on_save=self._saved, on_state=self._made_state)
        self.trainer = Trainer(recipe, None, hooks=hooks)
        if self.trainer.accelerator.num_processes > 1:
            raise UserError("compare: start it as one process; it trains one run after the other")
        self.budget, self.banks, self.watch = budget, banks, watch
        self.spent, self._before = Spent(), Spent()
        self._clouded = False
        self._calls = Calls(self.trainer.roles.values())
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        if run is not None:
            self.trainer.attach(run)

    def settle(self) -> Spent:
        """The account at this moment."""
        before = self._before
        self.spent = Spent(
            self.trainer.progress.done,
            before.seconds + time.perf_counter() - self._started,
            before.calls + self._calls.total,
            before.cpu_seconds + time.process_time() - self._cpu_started,
            before.peak_memory_mib if self._clouded else max(before.peak_memory_mib, peak_memory()),
            before.resumes,
        )
        return self.spent

    def charge(self, cost: Spent) -> None:
        """Add what was not spent here but must count."""
        self._before = self._before.plus(cost)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within is not charged."""
        before = self.settle()
        yield
        self._before = replace(self._before.minus(self.settle().minus(before)), peak_memory_mib=before.peak_memory_mib)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._clouded = True  # the largest size of a process is never taken back
        self.settle()

    def fit(self) -> None:
        """Train to the end or until the budget is spent."""
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        try:
            if not self.used_up():
                self.trainer.fit()
        except BudgetSpent:
            pass
        stage, before = self.trainer.progress.stage, len(self.trainer.recipe.before)
        if stage < before:
            raise UserError(
                f"the budget was spent in stage {stage + 1} of {before + 1}: "
                "its steps cost more than when they were probed"
            )

    def resume(self) -> bool:
        """Continue from the newest checkpoint with the account that belongs to it."""
        found, run = self.trainer.resume(), self.trainer.run
        if found and run is not None:
            done = self.trainer.progress.done
            entries = [e for e in account_of(run) if e.done == done]
            if not entries:
                raise UserError(f"{run}: account.jsonl does not tell what step {done} had cost")
            self.spent = self._before = replace(entries[-1], resumes=entries[-1].resumes + 1)
        return found

    def used_up(self) -> bool:
        """Whether a budget of seconds or calls is spent; updates are counted by the stages' steps."""
        counts = self.budget is not None and not self.budget.in_steps
        return counts and self.spent.of(self.budget.kind) >= self.budget.amount  # type: ignore[arg-type,union-attr]

    def _stepped(self, trainer: Trainer) -> None:
        self.settle()
        if self.watch:
            self.watch(self)
        if trainer.progress.stage < len(trainer.recipe.stages()) and self.used_up():
            trainer.save()
            raise BudgetSpent

    def _saved(self, trainer: Trainer) -> None:
        if trainer.run is not None:
            with (trainer.run / "account.jsonl").open("a") as f:
                f.write(json.dumps(self.settle().__dict__) + "\n")

    def _made_state(self, roles: Roles) -> None:
        for module in roles["state"].modules() if "state" in roles else ():
            if isinstance(module, Pairs) and self.banks is not None:
                module.source = self._from_bank

    def _from_bank(
        self, pairs: Pairs, teacher: nn.Module, sampler: Sampler, guidance: float, make: Callable[[], None]
    ) -> None:
        """The pairs of an earlier run with the same teacher, sampler and guidance, or this run's, kept for others."""
        assert self.banks is not None
        path = self.banks / f"{bank_key(teacher, pairs, sampler, guidance)}.safetensors"
        cost = _load_bank(path, pairs)
        if cost is not None:
            self.charge(cost)
            return
        before = self.settle()
        make()
        cost = self.settle().minus(before)
        with atomic_path(path) as temporary:
            told = json.dumps([cost.seconds, cost.calls, cost.cpu_seconds])
            save_file({"x0": pairs.x0.cpu().contiguous()}, temporary, metadata={"cost": told})


def bank_key(teacher: nn.Module, pairs: Pairs, sampler: Sampler, guidance: float) -> str:
    """32 hex digits over everything that the samples of a bank depend on."""
    process: Any = teacher.process
    content = [state_sha256(teacher), repr(process), plain(sampler), guidance, list(pairs.x0.shape)]
    digest = hashlib.sha256(json.dumps(content).encode())
    cond = pairs.conditions()
    for value in () if cond is None else cond.values() if isinstance(cond, Mapping) else (cond,):
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _load_bank(path: Path, pairs: Pairs) -> Spent | None:
    """Fill `pairs` from a file and tell what making it had cost; None where there is no whole file."""
    try:
        with safe_open(path, framework="pt") as archive:
            names = ("seconds", "calls", "cpu_seconds")
            cost = spent_of(dict(zip(names, parse_json(archive.metadata()["cost"], path), strict=True)))
            pairs.x0.copy_(archive.get_tensor("x0"))
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, RuntimeError):
        return None
    pairs.filled.fill_(len(pairs.x0))
    return cost


def probe(recipe: Recipe, budget: Budget, banks: Path | None = None) -> list[tuple[float, float]]:
    """Cost of the first and of a further step of each stage, in the budget's unit, by taking a few."""
    short = with_lengths(recipe, [PROBE] * len(recipe.stages()))
    marks: list[float] = [0.0]
    Accounted(short, None, banks=banks, watch=lambda a: marks.append(a.spent.of(budget.kind))).fit()
    steps = [b - a for a, b in pairwise(marks)]
    stages = [steps[i : i + PROBE] for i in range(0, len(steps), PROBE)]
    return [(s[0], sum(s[1:]) / (PROBE - 1)) for s in stages]
