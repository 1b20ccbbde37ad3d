"""`fewstep.open_product`: what a run made, or a folder, drawn from, measured and exported from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fewstep.config import UserError
from fewstep.networks.adapters import placed
from fewstep.networks.folder import resolve
from fewstep.recipe.schema import MOST_STEPS, Evaluate, default_metric
from fewstep.train import product as opened

if TYPE_CHECKING:
    from fewstep.eval.protocol.evaluation import Evaluation
    from fewstep.export.base import Exported
    from fewstep.train.trainer import Trainer


class Product(opened.Product):
    """What `open_product` opens: a denoiser (`net`), how it is sampled (`sampler`) and what it samples (`shape`).

    `classes` is 0 where samples are of none, `recipe` None for a folder that is no run.

    >>> product = fewstep.open_product("runs/digits")
    >>> product
    Product(digits: (1, 8, 8), 10 classes, 1 step)
    >>> product.shape, product.classes, product.sampler.steps
    ((1, 8, 8), 10, (1.0,))
    """

    def __repr__(self) -> str:
        steps = len(self.sampler.steps)
        classes = f"{self.classes} classes, " if self.classes else ""
        return f"Product({self.title}: {self.shape}, {classes}{steps} step{'s' * (steps > 1)})"

    def to(self, device: str | torch.device) -> Product:
        """Move the net, whose samples still come back on the CPU; returns this product.

        >>> fewstep.open_product("runs/ring").to("cpu").device()
        device(type='cpu')
        """
        placed(self.net, device)
        return self

    def draw(
        self,
        count: int,
        seed: int = 0,
        labels: Any = None,
        batch: int = 256,
        *,
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """Samples float32 (count, *shape) on the CPU, decoded where there is a VAE; pictures lie in [-1, 1].

        Sample i of a seed is the same for any count and batch.

        Args:
            labels: a class for all, or one for each sample; left out, the classes in turn (text: the data's prompts).
            prompts: of a student of text, in turn.

        Raises:
            UserError: an argument that does not fit this product; the message names it.

        >>> product = fewstep.open_product("runs/digits")
        >>> product.draw(4, seed=1, labels=[3, 1, 4, 1]).shape
        torch.Size([4, 1, 8, 8])
        >>> product.draw(4, labels=10)
        Traceback (most recent call last):
        fewstep.config.parts.UserError: labels: the classes are 0..9, not 10
        """
        if prompts is not None:
            if labels is not None:
                raise UserError("labels: samples are of classes or of prompts; leave one out")
            labels = self._embedded(prompts, count)
        return super().draw(count, seed, labels, batch)

    def _embedded(self, prompts: Sequence[str], count: int) -> Any:
        from fewstep.data.text import embed

        data: Any = None if self.recipe is None else self.recipe.data
        if getattr(data, "encoder", None) is None:
            raise UserError(f"prompts: {self.title} was not trained on text, so it takes none")
        if self.image is not None:
            raise UserError(f"prompts: {self.title} makes samples from the data's pictures; leave out prompts")
        if isinstance(prompts, str) or not prompts:
            raise UserError(f"prompts: expected a list of at least one, not {prompts!r}")
        text = embed(data.encoder, prompts, negative=data.negative, zeros=data.zeros, cache=data.text_cache)
        return text.take(torch.arange(max(count, 0)) % len(prompts))

    def with_steps(self, steps: int | None, any_steps: bool = False) -> Product:
        """The same net at another number of steps; UserError when it was not trained for it, unless `any_steps`.

        >>> teacher = fewstep.open_product("assets:digits-teacher").with_steps(4)
        >>> len(teacher.sampler.steps), teacher.sampler.network_calls()
        (4, 7)
        >>> fewstep.open_product("runs/digits").with_steps(4)
        Traceback (most recent call last):
        fewstep.config.parts.UserError: steps 4: this student was trained for 1; any_steps=True tries it anyway
        """
        if steps is not None and (not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS):
            raise UserError(f"steps must be a whole number of 1 to {MOST_STEPS}, not {steps!r}")
        if steps is not None and self.trained is not None and steps not in self.trained and not any_steps:
            allowed = ", ".join(map(str, self.trained))
            raise UserError(f"steps {steps}: this student was trained for {allowed}; any_steps=True tries it anyway")
        found = super().with_steps(steps, any_steps=True)
        assert isinstance(found, Product)
        return found

    def evaluate(
        self,
        against: str | Path | None = None,
        *,
        metric: str | None = None,
        features: str | None = None,
        samples: int | None = None,
        seed: int | None = None,
        extractor_path: str | Path | None = None,
        batch: int = 256,
    ) -> Evaluation:
        """Draw and measure; an `Evaluation`, whose `metrics` are all numbers and `distance` the one that ranks.

        Without arguments it is what the recipe's `evaluate` says, or the default for its data.

        Args:
            against: real pictures to compare with: a folder of any size, a statistics file (.npz), or "data", the
                recipe's own. FD with its error, KID, precision and recall (metric "fd").
            metric: a preset of `fewstep eval --list-presets`, or a YAML file.
            features: of metric fd: effnet-lite0, inception, dinov2, clip or clip:ARCHITECTURE, house.
            samples, seed: how many are drawn, and the first seed.
            extractor_path: weights of the features that come with no package.
            batch: samples of one network call.

        Raises:
            UserError: what cannot be measured so; the message names the argument.

        >>> digits = fewstep.open_product("runs/digits")
        >>> result = digits.evaluate(against="data", features="house", samples=40)
        >>> result.number, result.distance.value > 0
        (40, True)
        >>> fewstep.open_product("runs/ring").evaluate(samples=100).preset
        'energy'
        """
        from fewstep.commands.judge import judge_of
        from fewstep.commands.measure import measure

        opened.check_count("batch", batch)
        given = {"features": features, "samples": samples, "seed": seed}
        given |= {k: None if v is None else str(v) for k, v in (("against", against), ("extractor_path", extractor_path))}
        spec = self._spec(metric, {k: v for k, v in given.items() if v is not None})
        return measure(self, judge_of(self, spec), batch=batch)[0]

    def _spec(self, metric: str | None, given: Mapping[str, Any]) -> Evaluate:
        own = None if self.recipe is None else self.recipe.evaluate
        fd = [k for k in ("against", "features", "extractor_path") if k in given]
        if metric not in (None, "fd") and fd:
            raise UserError(f"{fd[0]}: is of metric fd, and metric {metric} has its own; give one or the other")
        try:
            if metric == "fd" or fd:
                if self.recipe is None and given.get("against", "data") == "data":
                    raise UserError("against: only a run knows its own data; give a folder of real pictures or FILE.npz")
                kept = own if own is not None and own.metric == "fd" else replace(own or Evaluate(), metric="fd")
                spec = replace(kept, **given)
                if len(self.shape) != 3:
                    raise UserError(f"{fd[0] if fd else 'metric'}: is for pictures; these samples are {list(self.shape)}")
                return spec
            if metric is not None:
                numbers = {} if own is None else {"samples": own.samples, "seed": own.seed}
                return Evaluate(metric=metric, **{**numbers, **given})
            found = own or Evaluate(metric=None if self.recipe is None else default_metric(self.recipe.data))
            if found.metric is None:
                raise UserError(
                    f"against: nothing says how to measure {self.title}; give a folder of real pictures, or a metric of "
                    "those that `fewstep eval --list-presets` names"
                )
            return replace(found, **given)
        except ValidationError as error:
            problem = error.errors()[0]
            name = next((str(part) for part in problem["loc"] if part in given), "")
            reason = problem["msg"].removeprefix("Value error, ")
            raise UserError(f"{name}: {reason}, not {given[name]!r}" if name else reason) from None

    def export(
        self,
        folder: str | Path,
        *,
        lora: bool = False,
        dtype: str = "fp32",
        format: str = "diffusers",
        variant: bool = False,
        image_to_image: float | None = None,
    ) -> Exported:
        """Write a folder that plain diffusers opens, or nothing at all; an `Exported`, whose `usage` are the lines.

        It is compared with this sampler before it is in place (`parity`).

        Args:
            folder: must not exist, be empty or hold an earlier export.
            lora: the adapter alone, as `load_lora_weights` reads it.
            dtype: of the weights of a student of a text or latent pipeline: fp32, bf16 or fp16.
            format: of an adapter's file: diffusers, kohya or comfyui.
            variant: name the weights' files after the dtype, for `from_pretrained(..., variant="fp16")`.
            image_to_image: trained level below 1 from which the pipeline goes on, with a picture noised to it.

        Raises:
            UserError: an argument that is none of these, no stock pipeline takes this product's steps, it was opened from
                a diffusers folder, or the folder holds something else.

        >>> done = fewstep.open_product("runs/digits").export("exported")
        >>> done.parity < 1e-4
        True
        >>> print(done.usage.splitlines()[0])
        from diffusers import ConsistencyModelPipeline
        """
        from fewstep.export.base import ExportRefused
        from fewstep.export.choose import check_options, export
        from fewstep.export.levels import check_product
        from fewstep.export.lora import export_lora

        check_options(lora, dtype, format, variant, image_to_image, python=True)
        if self.recipe is None:
            raise UserError(f"{self.title}: is a diffusers folder and no run; it needs no export")
        try:
            if lora:
                return export_lora(self, Path(folder), format)
            check_product(self)
            return export(self, Path(folder), dtype=dtype, variant=variant, image_to_image=image_to_image)
        except ExportRefused as refusal:
            raise UserError(f"{self.title}: not exported: {refusal}") from None


def open_product(path: str | Path | Trainer) -> Product:
    """Open what can be drawn from: a run directory, an export or a teacher's folder without text, or a trainer.

    A trainer's product has the trainer's own weights, which move as it trains on. A pipeline of text draws by itself:
    `fewstep sample FOLDER --prompt` calls it, and the run that it was exported from is opened here.

    Args:
        path: the directory, "assets:NAME" for a folder that ships with fewstep, or a `Trainer`.

    Raises:
        UserError: it is none of these, or a run without a checkpoint yet.

    >>> fewstep.open_product("runs/ring").draw(5).shape
    torch.Size([5, 2])
    >>> teacher = fewstep.open_product("assets:digits-teacher")
    >>> teacher.with_steps(2).draw(3, labels=[0, 1, 2]).shape
    torch.Size([3, 1, 8, 8])
    """
    if isinstance(path, str | Path):
        found = opened.open_product(resolve(str(path)))
    elif hasattr(path, "product") and hasattr(path, "recipe"):
        title = path.run.name if path.run is not None else "student"
        net = path.product.eval()
        found = opened.product_of(path.recipe, net, path.data, title, path.progress.done)
    else:
        raise TypeError(f"path: expected a run directory, a folder or a Trainer, not a {type(path).__name__}")
    return Product(**{f.name: getattr(found, f.name) for f in fields(found)})
