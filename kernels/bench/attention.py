"""Attention with tangents against SDPA math JVP and SDPA flash forward; one run per table.

python -m fewstep.kernels.bench.attention            what this machine can measure
python -m fewstep.kernels.bench.attention --quick    fewer repeats
    --device cuda    its rows alone      --out FILE    another CSV than bench/results.csv
"""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.kernels import attention_jvp, reference
from fewstep.kernels.bench.record import RESULTS, UNMEASURED, Row, environment, write
from fewstep.kernels.bench.timing import BusyHost, fastest, least_cpu_seconds, peak_extra_bytes

GOALS = {1024: ("2.5", "0.4"), 4096: ("3", "0.1")}
SELF = {
    f"cuda triton, H={heads} D={d} bf16, N={n}": (heads, d, n)
    for heads, d in ((24, 128), (32, 64))
    for n in (1024, 4096, 8192)
}
"""Heads, width and tokens of the self-attention that is measured on a GPU."""
CROSS = "cuda triton, cross-attention 4096x512, H=24 D=128 bf16"


def inputs(n: int, d: int, heads: int, dtype: torch.dtype, device: str, m: int | None = None) -> list[Tensor]:
    """q, k, v, tq, tk, tv of (1, heads, n or m, d)."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, n if i % 3 == 0 else m or n, d, device=device).to(dtype) for i in range(6)]


def math_jvp(x: list[Tensor]) -> Any:
    """SDPA's only differentiable path, under torch.func.jvp."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, tuple(x[:3]), tuple(x[3:]))


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in fp64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def _row(case: str, metric: str, value: float | None, at_least: str, detail: str, device: str) -> Row:
    text = UNMEASURED if value is None else f"{value:.3g}"
    env = environment(device) if value is not None else {}
    return Row("attention", case, metric, text, at_least, detail, **env)


def _probe(name: str, n: int) -> int:
    command = [sys.executable, "-m", "fewstep.kernels.bench.attention", "--probe", name, str(n)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def probe(name: str, n: int) -> int:
    """Peak extra bytes of one CPU call in this process, after a small call of the same kind."""
    torch.set_num_threads(2)
    call: Callable[[list[Tensor]], Any] = math_jvp if name == "math" else (lambda x: attention_jvp(*x))
    call(inputs(64, 64, 8, torch.float32, "cpu"))
    x = inputs(n, 64, 8, torch.float32, "cpu")
    return peak_extra_bytes(lambda: call(x), "cpu")


def errors(device: str, dtype: torch.dtype, impl: str) -> list[Row]:
    """Tangent error against fp64 of the same inputs: iid, and keys with a common mode."""
    rows = []
    for common in (0, 4, 10):
        q, k, v, *tangents = inputs(1024, 64, 2, torch.float32, device)
        k = k + common * torch.randn(1, 2, 1, 64, device=device)
        x = [t.to(dtype) for t in (q, k, v, *tangents)]
        o, to = attention_jvp(*x, impl=impl)
        exact = reference.attention_jvp(*(t.double() for t in x), scale=0.125)
        name = "iid" if not common else f"K common mode x{common}"
        case = f"{device} {impl}, {str(dtype)[6:]}, N=1024 D=64, {name}"
        rows.append(_row(case, "tangent relative error", relative(to, exact[1]), "<= 2.5e-3", "fp64", device))
        rows.append(_row(case, "output relative error", relative(o, exact[0]), "<= 2.5e-3", "fp64", device))
    return rows


def _ratios(case: str, calls: dict[str, Callable[[], Any]], pairs: list[tuple[str, str, str, str]],
            repeats: int) -> list[Row]:  # fmt: skip
    """Rows of over/under for pairs (metric, over, under, goal): wall time, and one-thread processor time.

    Wall rows stay unmeasured on a busy host; processor time is what such a host can still tell.
    """
    rows = []
    used = least_cpu_seconds(calls, max(1, repeats // 2))
    detail = "1 thread: " + ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in used.items())
    for metric, over, under, goal in pairs:
        rows.append(_row(case, f"{metric}, processor time of 1 thread", used[over] / used[under], goal, detail, "cpu"))
    try:
        wall = fastest(calls, repeats, "cpu")
    except BusyHost as busy:
        return rows + [_row(case, f"{m}, wall time", None, goal, f"host busy: {busy}", "cpu") for m, _, _, goal in pairs]
    detail = ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in wall.items())
    for metric, over, under, goal in pairs:
        rows.append(_row(case, f"{metric}, wall time", wall[over] / wall[under], goal, detail, "cpu"))
    return rows


def cpu_self(n: int, repeats: int) -> list[Row]:
    """Self-attention of n tokens on the CPU: memory, error and time against SDPA math JVP."""
    speed, memory = GOALS[n]
    case = f"cpu chunked, H=8 D=64 fp32, N={n}"
    peaks = {name: _probe(name, n) for name in ("math", "ours")}
    detail = ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in peaks.items())
    ratio = peaks["ours"] / peaks["math"]
    rows = [_row(case, "peak extra memory over SDPA math JVP", ratio, f"<= {memory}", detail, "cpu")]
    x = inputs(n, 64, 8, torch.float32, "cpu")
    if n <= 1024:
        error = relative(attention_jvp(*x)[1], math_jvp([t.double() for t in x])[1])
        rows.append(_row(case, "tangent relative error", error, "", "fp64", "cpu"))
    calls = {
        "math": lambda: math_jvp(x),
        "ours": lambda: attention_jvp(*x),
        "flash forward": lambda: F.scaled_dot_product_attention(*x[:3]),
    }
    pairs = [
        ("times faster than SDPA math JVP", "math", "ours", f">= {speed}"),
        ("time over SDPA flash forward", "ours", "flash forward", ""),
    ]
    return rows + _ratios(case, calls, pairs, repeats)


def cpu_cross(repeats: int) -> list[Row]:
    """Cross-attention on the CPU with key and value tangents absent, against the same with zeros."""
    q, k, v, tq, tk, tv = inputs(2048, 64, 8, torch.float32, "cpu", m=512)
    still = [torch.zeros_like(tk), torch.zeros_like(tv)]
    calls = {
        "skipped": lambda: attention_jvp(q, k, v, tq),
        "generic": lambda: attention_jvp(q, k, v, tq, *still),
    }
    case = "cpu chunked, cross-attention 2048x512, H=8 D=64 fp32"
    return _ratios(case, calls, [("time over the generic JVP", "skipped", "generic", "<= 0.72")], repeats)


def _rivals(x: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """The other kernels that are installed and run on these inputs."""
    rivals: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("jvp_flash_attention") is not None:

        def theirs() -> Any:
            from jvp_flash_attention.jvp_attention import attention

            return torch.func.jvp(attention, tuple(x[:3]), tuple(x[3:]))

        rivals["jvp_flash_attention"] = theirs
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    rivals["FlexAttention forward"] = lambda: compiled(*x[:3])
    return {name: call for name, call in rivals.items() if _runs(name, call)}


def _runs(name: str, call: Callable[[], Any]) -> bool:
    # jvp_flash_attention 0.14 needs block pointers, which Triton 3.9 no longer has
    try:
        call()
    except Exception as error:
        print(f"{name} does not run here and is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    return True


def gpu(repeats: int) -> Iterator[Row]:
    """The GPU rows, each as it is known, errors first; the same rows marked unmeasured where there is no CUDA device."""
    if not torch.cuda.is_available():
        yield from _without_gpu()
        return
    yield from errors("cuda", torch.bfloat16, "triton")
    q, k, v, tq, tk, tv = inputs(4096, 128, 24, torch.bfloat16, "cuda", m=512)
    still = [torch.zeros_like(tk), torch.zeros_like(tv)]
    t = fastest({"skipped": lambda: attention_jvp(q, k, v, tq, impl="triton"),
                 "generic": lambda: attention_jvp(q, k, v, tq, *still, impl="triton")}, repeats, "cuda")  # fmt: skip
    yield _row(CROSS, "time over the generic JVP", t["skipped"] / t["generic"], "<= 0.72", "", "cuda")
    for case, (heads, d, n) in SELF.items():
        x = inputs(n, d, heads, torch.bfloat16, "cuda")
        calls = {"ours": lambda x=x: attention_jvp(*x, impl="triton"), "math": lambda x=x: math_jvp(x)}
        calls |= {"flash forward": lambda x=x: F.scaled_dot_product_attention(*x[:3])} | _rivals(x)
        t = fastest(calls, repeats, "cuda")
        detail = ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in t.items())
        rate = 6 * 2 * heads * n * n * d / t["ours"] / 1e12
        yield _row(case, "TFLOP/s, 6 matmuls", rate, ">= 400" if n >= 4096 else "", detail, "cuda")
        for name, seconds in t.items():
            if name == "ours":
                continue
            label = "SDPA math JVP" if name == "math" else name
            goal = {"math": ">= 3.5" if n == 8192 else "", "jvp_flash_attention": ">= 1.5"}.get(name, "")
            yield _row(case, f"times faster than {label}", seconds / t["ours"], goal, detail, "cuda")
        extra = peak_extra_bytes(calls["ours"], "cuda") / 2**30
        goal = "<= 0.5" if n == 8192 and d == 128 else ""
        yield _row(case, "peak extra GiB", extra, goal, "outputs included", "cuda")


def _without_gpu() -> Iterator[Row]:
    for case, (_, d, n) in SELF.items():
        goals = [("TFLOP/s, 6 matmuls", ">= 400" if n >= 4096 else "")]
        goals += [("times faster than SDPA math JVP", ">= 3.5" if n == 8192 else "")]
        goals += [("times faster than jvp_flash_attention", ">= 1.5")]
        goals += [("peak extra GiB", "<= 0.5" if n == 8192 and d == 128 else "")]
        for metric, goal in goals:
            yield _row(case, metric, None, goal, "needs a GPU", "cuda")
    yield _row(CROSS, "time over the generic JVP", None, "<= 0.72", "needs a GPU", "cuda")
    for name in ("iid", "K common mode x4", "K common mode x10"):
        case = f"cuda triton, bfloat16, N=1024 D=64, {name}"
        yield _row(case, "tangent relative error", None, "<= 2.5e-3", "needs a GPU", "cuda")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what this machine can and writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="whose rows alone; both when left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV to put them into")
    parser.add_argument("--probe", nargs=2, metavar=("NAME", "N"))
    arguments = parser.parse_args(argv)
    if arguments.probe:
        print(probe(arguments.probe[0], int(arguments.probe[1])))
        return
    repeats = 4 if arguments.quick else 15
    if arguments.device != "cpu":  # first: on a CPU 4096 tokens take minutes
        for row in gpu(repeats):
            write([row], arguments.out)
    if arguments.device != "cuda":
        torch.set_num_threads(2)
        write(cpu_self(1024, repeats), arguments.out)
        write(cpu_cross(repeats), arguments.out)
        write(errors("cpu", torch.bfloat16, "chunked"), arguments.out)
        write(cpu_self(4096, max(2, repeats // 3)), arguments.out)


if __name__ == "__main__":
    main()
