"""Time of a whole evaluation of a folder against clean-fid on the same folder and extractor.

``python -m fewstep.eval.tools.bench_folder --images 10000``
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from fewstep.eval.features.base import random_conv
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.protocol.images import ImageFolder, save_image
from fewstep.eval.protocol.resize import Step
from fewstep.eval.protocol.runner import extract_images


def main(arguments: list[str] | None = None) -> None:
    """Write two folders of 32x32 noise images, measure both tools, print seconds and the two values."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.eval.tools.bench_folder", description=__doc__)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--size", type=int, default=32, help="side of the images; the network sees them as they are")
    parser.add_argument("--workers", type=int, default=2, help="clean-fid's data loader processes")
    options = parser.parse_args(arguments)
    from cleanfid import fid

    extractor = random_conv(0, dim=64)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / name for name in ("sample", "reference")]
        for part, folder in enumerate(folders):
            for start in range(0, options.images, 1000):
                coarse = torch.rand(1000, 3, 4, 4, generator=generator) * (200 + 40 * part)
                fine = torch.nn.functional.interpolate(coarse, size=(options.size,) * 2, mode="bilinear")
                for offset, image in enumerate(fine.round().to(torch.uint8)):
                    if start + offset < options.images:
                        save_image(image, folder / f"{start + offset:06d}.png")
        start_time = time.perf_counter()
        sample, reference = (
            extract_images(ImageFolder(folder).batches(256), extractor, [Step("clean-bicubic", options.size)])
            for folder in folders
        )
        ours = frechet_distance(sample.features, reference.statistics)
        our_seconds = time.perf_counter() - start_time
        start_time = time.perf_counter()
        theirs = fid.compute_fid(
            *map(str, folders),
            num_workers=options.workers,
            batch_size=256,
            device=torch.device("cpu"),
            use_dataparallel=False,
            verbose=False,
            custom_feat_extractor=extractor,
            custom_fn_resize=lambda x: x.astype("float32"),
        )
        their_seconds = time.perf_counter() - start_time
    print(f"two folders of {options.images} images, {options.size}x{options.size}, {extractor.name}")
    print(f"ours {our_seconds:.1f} s (with error bar), clean-fid {their_seconds:.1f} s, value {ours} and {theirs:.6g}")
    print(f"ratio {their_seconds / our_seconds:.2f}")


if __name__ == "__main__":
    main()
