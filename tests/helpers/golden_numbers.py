"""Golden numbers of public reference code: their networks, and fewstep's methods on the same listed draws, in float64.

A file of tests/laws/golden holds a reference's source, inputs, networks and outputs. A network is
raw = A x + B h + f with h = tanh(C x + D scalars + L[label]), x (b, d), scalars = [time, *inputs]; a discriminator is
Q tanh(P h + p) on the h of its trunk. `expected` holds gradients with respect to a network's weights in the reference's
units; fewstep must give `factor` times that (`conversion` says why).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

import fewstep.methods  # noqa: F401  registers the methods
from fewstep.algebra.batch import Batch
from fewstep.algebra.draws import Draws
from fewstep.algebra.prediction import Prediction, from_raw
from fewstep.algebra.sampling import Sampler, sample
from fewstep.config import REGISTRY, Source, validate
from fewstep.networks.roles import Roles

FOLDER = Path(__file__).parents[1] / "laws" / "golden"
TIME: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda t: t,
    "5t": lambda t: 5 * t,
    "index/100": lambda t: (t - 1) / 100,
    "log(t)/4": lambda t: torch.log(t) / 4,
}
"""What a network is told of the process time; on tables t is the index + 1."""


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    """float64 by default in every test of a module that imports this."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def case_of(files: dict[str, Any], stem: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(file, a copy of its case of this name)."""
    doc = files[stem]
    return doc, copy.deepcopy(next(case for case in doc["cases"] if case["name"] == name))


class Listed(nn.Module):
    """Named float64 arrays as parameters."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        super().__init__()
        for name, value in numbers.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))


class Network(nn.Module):
    """A listed network as fewstep's denoiser."""

    def __init__(self, spec: dict[str, Any], process: Any) -> None:
        super().__init__()
        self.raw: Any = Listed(spec["weights"])
        self.process, self.kind = process, spec["output"]
        self.time, self.inputs = TIME[spec["time"]], tuple(spec["inputs"])
        self.takes_s = "s" in self.inputs

    def hidden(self, x: Tensor, t: Tensor, label: Any, **given: Any) -> tuple[Tensor, Tensor]:
        """(scaled x, h)."""
        absent = {"s": t, "w": torch.ones_like(t), "mirror": torch.zeros_like(t)}
        told = {n: absent[n] if given.get(n) is None else given[n] for n in self.inputs}
        scalars = [self.time(t), *(self.time(v) if n == "s" else v for n, v in told.items())]
        if self.kind in ("edm", "cm"):
            x = x / torch.sqrt(t**2 + self.process.sigma_data**2)[:, None]
        by_label = 0 if label is None else self.raw.L[label]
        return x, torch.tanh(x @ self.raw.C.T + torch.stack(scalars, 1) @ self.raw.D.T + by_label)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, *, taps: Sequence[str] = (), **given: Any) -> Prediction:
        scaled, h = self.hidden(x, t, cond, **given)
        raw = scaled @ self.raw.A.T + h @ self.raw.B.T + self.raw.f
        return from_raw(self.process, self.kind, x, t, raw, {"h": h} if taps else {})

    def features(self, x: Tensor, t: Tensor, cond: Any, taps: Sequence[str]) -> dict[str, Tensor]:
        return {"h": self.hidden(x, t, cond)[1]}


class Experts(nn.Module):
    """The first network above the process time `edge`, the second at and below it."""

    takes_s, inputs = False, ()

    def __init__(self, first: Network, second: Network, edge: float) -> None:
        super().__init__()
        self.parts, self.edge, self.process = nn.ModuleList([first, second]), edge, first.process

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **call: Any) -> Prediction:
        return self.parts[0 if float(t[0]) > self.edge else 1](x, t, cond, **call)


class Heads(Listed):
    """Logits (b, heads) on the features of another network."""

    taps: tuple[str, ...] = ("h",)
    trunk: tuple[Network, ...] = ()

    def logits(self, features: Any) -> Tensor:
        return torch.tanh(features["h"] @ self.P.T + self.p) @ self.Q.T  # type: ignore[operator,union-attr]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.logits(self.trunk[0].features(x, t, cond, self.taps))


class Line(Listed):
    """A scalar of time, such as a log variance: k[0] + k[1] t."""

    def forward(self, t: Tensor) -> Tensor:
        return self.k[0] + self.k[1] * t  # type: ignore[index,operator]


class Replay(Draws):
    """Answers a method's draws with listed numbers, in order; another kind of draw than the next is an error."""

    def __init__(self, rows: int, queue: Sequence[tuple[str, Any]]) -> None:
        super().__init__(0, torch.arange(rows))
        self.queue = list(queue)

    def take(self, kind: str) -> Any:
        name, value = self.queue.pop(0)
        assert name == kind, f"fewstep asks for {kind}, the file has {name} next"
        return value

    def normal(self, *shape: int, dtype: Any = None) -> Tensor:
        return torch.tensor(self.take("normal"), dtype=torch.float64).reshape(len(self), *shape)

    def uniform(self, *shape: int) -> Tensor:
        return torch.tensor(self.take("uniform"), dtype=torch.float64).reshape(len(self), *shape)

    def integers(self, high: int) -> Tensor:
        return torch.tensor(self.take("integers"))

    def shared_integer(self, high: int) -> int:
        return self.take("shared")


class Given:
    """A distribution of times, or a pairing, that answers with listed process times."""

    def __init__(self, queue: Sequence[Any]) -> None:
        self.queue = list(queue)

    def sample(self, *_: Any, **__: Any) -> Any:
        found = torch.tensor(self.queue.pop(0), dtype=torch.float64)
        return tuple(found) if found.ndim == 2 else found


def build(kind: str, spec: dict[str, Any]) -> Any:
    """A registered part from its recipe form, the keys that a part leaves out as a recipe fills them in."""
    return validate(REGISTRY[kind][spec["name"]], Source(spec, {}))


def networks(doc: dict[str, Any]) -> dict[str, Any]:
    """The networks of a file by name, each after those that it stands on."""
    process, made = build("process", doc["process"]), {}
    for name, spec in doc["network"].items():
        if "output" in spec:
            made[name] = Network(spec, process)
        elif "trunk" in spec:
            made[name] = Heads(spec["weights"])
            made[name].trunk = (made[spec["trunk"]],)
        elif "line" in spec:
            made[name] = Line({"k": spec["line"]})
        else:
            made[name] = Experts(*(made[e] for e in spec["experts"]), spec["edge"])
    return made


def losses_of(doc: dict[str, Any], case: dict[str, Any], nets: dict[str, Any]) -> Any:
    """The first losses that fewstep's method yields on a case's inputs."""
    inputs, how = case["inputs"], case["fewstep"]
    method = build("method", how["method"])
    for path, names in how["times"].items():
        *owner, field = path.split(".")
        part = method
        if owner:
            # A copy: the part may be the method's default, which all its instances share.
            part = copy.copy(getattr(method, owner[0]))
            object.__setattr__(method, owner[0], part)
        listed = [[inputs[n] for n in name] if isinstance(name, list) else inputs[name] for name in names]
        object.__setattr__(part, field, Given(listed))

    def given(name: str) -> Tensor | None:
        return None if inputs.get(name) is None else torch.tensor(inputs[name])

    draws = Replay(case["rows"], [(kind, inputs[name]) for kind, name in how["draws"]])
    batch = Batch(draws, (doc["dimension"],), given("x0"), given("label"), given("null_label"))
    roles = Roles(**{role: nets[name] for role, name in how["roles"].items()})
    turns = method.turns(roles, 0) if how["call"] == "turns" else None
    for _ in range(how.get("turn", 0) + 1):
        made = next(turns).losses(batch) if turns else getattr(method, how["call"])(roles, batch, *how["args"])
        losses = next(iter(made))
    assert not draws.queue, f"fewstep left {len(draws.queue)} draws unused"
    return losses


def differences(doc: dict[str, Any], case: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """(difference, limit) of every expected term: its gradient and, as `... value`, its loss.

    A difference is the largest absolute one over the largest absolute number of the reference.
    """
    nets, out = networks(doc), {}
    losses = losses_of(doc, case, nets)
    for name, term in case["expected"].items():
        value = sum(losses[k] for k in term["terms"]) if term["terms"] else losses.total()
        weights = {n.split(".")[-1]: p for n, p in nets[term["wrt"]].named_parameters()}
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True, retain_graph=True)
        ours = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(weights.items(), found, strict=True)}
        factor = term.get("factor", 1.0)
        theirs = {n: factor * torch.tensor(v, dtype=torch.float64) for n, v in term["grad"].items()}
        largest = max(float(v.abs().max()) for v in theirs.values())
        off = max(float((ours[n] - v).abs().max()) for n, v in theirs.items())
        out[name] = (off / largest, term["tolerance"])
        if term["loss"] is not None:
            out[f"{name} value"] = (
                abs(float(value.detach()) / (factor * term["loss"]) - 1),
                term["value_tolerance"],
            )
    return out


def sampled(doc: dict[str, Any], case: dict[str, Any]) -> Tensor:
    """What fewstep's sampler makes of a case's noise with the network `student`."""
    inputs = case["inputs"]
    sampler = TypeAdapter(Sampler).validate_json(json.dumps(case["fewstep"]["sampler"]))
    fresh = [torch.tensor(v) for v in inputs["fresh"]]
    noise, label = (None if inputs.get(n) is None else torch.tensor(inputs[n]) for n in ("noise", "label"))
    assert noise is not None
    with torch.no_grad():
        return sample(sampler, networks(doc)["student"], noise, label, lambda i: fresh[i])
