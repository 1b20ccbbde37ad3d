"""EMA of many tensors: torch._foreach_lerp_ against loops.

python -m fewstep.kernels.bench.ema
"""

import torch

from fewstep.kernels.bench.record import Row, environment, write
from fewstep.kernels.bench.timing import fastest, least_cpu_seconds
from fewstep.kernels.ema import ema_update


def main() -> None:
    """600 square tensors, as in a UNet; the ratios go into the CSV."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(2)
    rows = []
    for side in (128, 512):
        average = [torch.randn(side, side, device=device) for _ in range(600)]
        current = [torch.randn(side, side, device=device) for _ in range(600)]

        def loop(average: list[torch.Tensor] = average, current: list[torch.Tensor] = current) -> None:
            for a, c in zip(average, current, strict=True):
                a.mul_(0.999).add_(c, alpha=0.001)

        def lerps(average: list[torch.Tensor] = average, current: list[torch.Tensor] = current) -> None:
            for a, c in zip(average, current, strict=True):
                a.lerp_(c, 0.001)

        calls = {"mul+add loop": loop, "lerp loop": lerps}
        calls["foreach"] = lambda a=average, c=current: ema_update(a, c, 0.999)
        # one thread's processor time on a CPU: lists of small tensors hardly use more
        t = fastest(calls, 10, device) if device == "cuda" else least_cpu_seconds(calls, 5)
        detail = ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in t.items())
        for name in ("mul+add loop", "lerp loop"):
            ratio, case = t[name] / t["foreach"], f"{device}, 600 tensors of {side}x{side} fp32"
            rows.append(
                Row(
                    "ema",
                    case,
                    f"times faster than {name}",
                    f"{ratio:.3g}",
                    "",
                    detail,
                    **environment(device),
                )
            )
    write(rows)


if __name__ == "__main__":
    main()
