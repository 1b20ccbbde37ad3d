"""Several methods on one student at once: rCM's consistency plus score difference, and any other sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws, fold
from fewstep.algebra.sampling import Sampler
from fewstep.config import config, part
from fewstep.methods.critic import check_one_life
from fewstep.methods.method import Losses, MethodPart, Needs, Turn
from fewstep.methods.turns import turns_of
from fewstep.networks.roles import Roles


@config
class Share:
    """One method and the weight of its losses."""

    method: MethodPart
    """The method, with all its own settings."""
    weight: float = 1.0
    """Factor on every loss of the method."""
    start: int = 0
    """Update at which the method begins; rCM's score difference begins where sCM's warm-up ends."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.start < 0:
            raise ValueError(f"need weight > 0 and start >= 0, not {self.weight}, {self.start}")


@part("method", "joint")
class Joint:
    """Turns of several methods, merged where they train a role in common equally often: losses add, one step.

    Roles that some method steps together are stepped together in every turn: a learned weighting beside the student
    belongs to all methods that train the student. The first method's draws are its own; the others have streams of
    their own on the same batch of data. The student is sampled as the first method says (rCM, arXiv 2510.08431, has
    sCM and DMD2).
    """

    cites: ClassVar[tuple[str, ...]] = ("2510.08431",)

    methods: tuple[Share, ...]
    """Methods and weights."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty; name at least one")
        asked = sorted({n.process for n in (share.method.needs() for share in self.methods)} - {""})
        if len(asked) > 1:
            raise ValueError(f"methods need different processes of one student: {', '.join(asked)}")
        if all(share.start for share in self.methods):
            raise ValueError("every method starts later than at the first update; let one start at 0")
        following = [share.method.name for share in self.methods if "target" in share.method.needs().roles]
        if len(following) > 1:
            raise ValueError(
                f"{' and '.join(following)} both move the role target, an average of the student, which one update "
                "may move once: let one of them do without (target_decay: null)"
            )
        check_one_life([share.method for share in self.methods])

    @cached_property
    def companies(self) -> list[tuple[str, ...]]:
        """Sets of roles that share an optimiser: all that a chain of common turns connects."""
        found: list[tuple[str, ...]] = []
        for together in (updates for share in self.methods for updates in turns_of(share.method)):
            mine = [c for c in found if set(c) & set(together)]
            merged = tuple(dict.fromkeys(r for c in (*mine, together) for r in c))
            found = [c for c in found if c not in mine] + [merged]
        return found

    def needs(self) -> Needs:
        every = [share.method.needs() for share in self.methods]
        roles = frozenset().union(*(n.roles for n in every))
        trained = frozenset().union(*(n.trained for n in every))
        states = {str(i): n.state for i, n in enumerate(every) if n.state}

        def state(data: Any) -> nn.Module:
            return nn.ModuleDict({i: make(data) for i, make in states.items()})

        return Needs(
            roles,
            data=any(n.data for n in every),
            pairs=any(n.pairs for n in every),
            jvp="".join(sorted({d for n in every for d in n.jvp})),
            teacher_grad=any(n.teacher_grad for n in every),
            process=next((n.process for n in every if n.process), ""),
            inputs=frozenset().union(*(n.inputs for n in every)),
            conditions=frozenset.intersection(*(n.conditions for n in every)),
            frozen=roles - trained,
            parts=tuple(part for n in every for part in n.parts),
            reward=next((n.reward for n in sorted(every, key=lambda n: n.reward != "gradient") if n.reward), ""),
            state=state if states else None,
        )

    def turns(self, roles: Roles, step: int) -> Iterator[Turn]:
        running = {
            i: share.method.turns(self._roles(roles, i), step)
            for i, share in enumerate(self.methods)
            if step >= share.start
        }
        while running:
            groups: dict[tuple[Any, ...], list[tuple[int, Turn]]] = {}
            for i, turns in list(running.items()):
                turn = next(turns, None)
                if turn is None:
                    del running[i]
                else:
                    company = next((c for c in self.companies if set(turn.updates) <= set(c)), turn.updates)
                    turn = replace(turn, updates=company)
                    key = (company, turn.times, tuple(map(id, turn.batches)))
                    groups.setdefault(key, []).append((i, turn))
            for members in groups.values():
                yield self._merged(members)

    def _roles(self, roles: Roles, i: int) -> Roles:
        if "state" not in roles:
            return roles
        state: Any = roles.state
        own = [module for key, module in state.items() if key == str(i)]
        return roles.with_state(own[0] if own else None)

    def _merged(self, members: list[tuple[int, Turn]]) -> Turn:
        def losses(batch: Batch) -> Iterator[Losses]:
            for i, turn in members:
                key = fold(batch.draws.key, "joint", i)
                own = batch if i == 0 or turn.batches else replace(batch, draws=Draws(key, batch.draws.index))
                for term in turn.losses(own):
                    yield self._weighted(i, term)

        lives = [turn.life for _, turn in members if turn.life]
        return replace(members[0][1], losses=losses, life=min(lives, default=None))

    def _weighted(self, i: int, losses: Losses) -> Losses:
        share = self.methods[i]
        return Losses({f"{share.method.name}/{k}": share.weight * v for k, v in losses.items()}, losses.log)

    def sampler(self) -> Sampler:
        return self.methods[0].method.sampler()
