"""What a method is: a frozen dataclass that says what it needs, whose turn it is and how its product is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args

from torch import Tensor, nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.sampling import Sampler
from fewstep.config import REGISTRY, OneOf
from fewstep.data.base import Conditions, Data
from fewstep.networks.parts import Opened
from fewstep.networks.roles import Roles


@dataclass(frozen=True)
class Needs:
    """What a method asks of a run; checked before anything is loaded.

    >>> needs = fewstep.Needs(frozenset({"teacher", "student", "critic"}), process="flow")
    >>> sorted(needs.trained)
    ['critic', 'student']
    >>> needs.refuses_process(fewstep.EDM())
    'needs flow or shifted_flow, not edm'
    """

    roles: frozenset[str]
    data: bool = False
    """True: batch.x0 holds real samples. False: the data set is never read."""
    pairs: bool = False
    jvp: str = ""
    """Directions of x, t, s in which the student is differentiated in forward mode, such as "xt"; "" is none."""
    teacher_grad: bool = False
    """True: gradients flow through the teacher to its input (SiD, LADD)."""
    process: str = ""
    """The student's process by its recipe name; a process built upon it will do (shifted_flow for flow). "" is any."""
    inputs: frozenset[str] = frozenset()
    """Scalar inputs that the student must take beside the time: s, w, mirror."""
    conditions: frozenset[Conditions] = frozenset(get_args(Conditions))
    """What may stand beside a sample of the data; anything by default."""
    frozen: frozenset[str] = frozenset({"teacher"})
    """Those of `roles` that no optimiser ever steps (teacher, target networks); a reward is none either."""
    parts: tuple[Opened, ...] = ()
    """What the method reads files for (representations), opened once before anything is trained."""
    reward: Literal["", "value", "gradient"] = ""
    """What is asked of the role `reward`: its value alone, or its gradient with respect to the samples too."""
    state: Callable[[Data], nn.Module] | None = None
    """Makes the method's own buffers (ratio bins, banks) for a data set; they become the role `state`, checkpointed."""

    def __post_init__(self) -> None:
        if self.process and self.process not in REGISTRY["process"]:
            raise ValueError(f"process {self.process!r} is not one of {', '.join(REGISTRY['process'])}")

    def refuses_process(self, process: Any) -> str:
        """Why a student of this process will not do, such as `needs flow or shifted_flow, not edm`; "" if it will."""
        kinds = REGISTRY["process"]
        if not self.process or isinstance(process, kinds[self.process]):
            return ""
        allowed = [name for name, kind in kinds.items() if issubclass(kind, kinds[self.process])]
        return f"needs {' or '.join(allowed)}, not {process.name}"

    def refuses_inputs(self, inputs: Iterable[str]) -> str:
        """Why a student that takes these inputs beside the time will not do; "" if it will."""
        have = set(inputs)
        # A network that is told how long its jump is knows where it ends.
        if self.inputs <= (have | {"s"} if "length" in have else have):
            return ""
        return f"needs [{', '.join(sorted(self.inputs))}], not [{', '.join(sorted(have))}]"

    def refuses_conditions(self, conditions: Conditions) -> str:
        """Why data with these conditions will not do; "" if they will."""
        if conditions in self.conditions:
            return ""
        allowed = [kind for kind in get_args(Conditions) if kind in self.conditions]
        return f"needs data whose conditions are {' or '.join(allowed)}, not {conditions}"

    @property
    def trained(self) -> frozenset[str]:
        return self.roles - self.frozen - {"reward"}


class Losses(dict[str, Tensor]):
    """Named scalar terms, already weighted, that are summed and backwarded at once; `log` holds mere readings.

    >>> losses = fewstep.Losses({"match": torch.tensor(2.0), "gan": torch.tensor(0.5)}, log={"norm": torch.tensor(1.0)})
    >>> losses.total()
    tensor(2.5000)
    """

    def __init__(self, terms: dict[str, Tensor] | None = None, log: dict[str, Tensor] | None = None) -> None:
        super().__init__(terms or {})
        self.log = log or {}

    def join(self, other: Losses) -> Losses:
        """These terms and readings with those of `other`."""
        return Losses({**self, **other}, {**self.log, **other.log})

    def total(self) -> Tensor:
        return sum(self.values())  # type: ignore[return-value]


@dataclass(frozen=True)
class Turn:
    """One optimiser step of some roles, `times` times with fresh batches.

    losses(batch) yields one or more Losses; each is backwarded as it comes and the optimiser steps once. Roles that share
    tensors or a graph (a discriminator head on the critic's trunk) belong in one turn.

    >>> turn = fewstep.Turn(("critic",), lambda batch: [fewstep.Losses({"dsm": batch.noise().mean()})], times=2)
    >>> turn.updates, turn.times
    (('critic',), 2)
    """

    updates: tuple[str, ...]
    losses: Callable[[Batch], Iterable[Losses]]
    times: int = 1
    batches: tuple[Batch, ...] = field(default=(), compare=False)
    """Use these, one for each micro-batch, instead of fresh ones (methods that walk along one trajectory)."""
    life: int | None = None
    """Steps of the stage after which the roles have a fresh optimiser, whose rate begins anew; None: the whole stage."""

    def batch(self, micro: int) -> Batch | None:
        """The batch of a micro-batch, None for a fresh one."""
        return self.batches[micro] if self.batches else None


class Method(Protocol):
    """A paper as a frozen dataclass; its fields are its hyper-parameters."""

    name: str
    cites: ClassVar[tuple[str, ...]]
    """arXiv ids."""

    def needs(self) -> Needs: ...

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        """The turns of one step, in order. Resumed after each optimiser step, so it may hold things between.

        Listed with stand-ins for roles too (`fewstep.methods.turns`): networks are called in losses alone."""
        ...

    def sampler(self) -> Sampler:
        """How the student is meant to be sampled."""
        ...


MethodPart = Annotated[Method, OneOf("method")]
