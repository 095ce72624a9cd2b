"""The data path: filling the cache, starting on a filled one, the loader, and the whole step beside plain diffusers.

    python scripts/bench/data.py                           all tables, up to 100,000 pictures
    python scripts/bench/data.py --parts fill --counts 1000,10000
    python scripts/bench/data.py --parts step --pixels 512 --steps 10
    python scripts/bench/data.py --quick                   does it run at all? Its figures mean nothing

Pictures, caches and bases are made in a temporary folder, or in --root, which keeps them: 30 KB a picture, 3 GB for
the step. Figures are this machine's, with whatever else it does; CPU seconds depend on that least.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import data_fill
import data_start

PARTS = ("fill", "start", "step")


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.root or Path(temporary)
        if "fill" in options.parts:
            data_fill.table(options.counts, root, options.workers)
        if "start" in options.parts:
            data_start.table(options.start, root, 1 if options.quick else 3)
        if "step" in options.parts:
            import data_step  # heavy: while others are measured, no torch is here

            sizes = data_step.Sizes(options.pixels, options.batch, options.steps, options.entries, options.quick)
            (root / "step").mkdir()
            data_step.tables(sizes, root / "step")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_names, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--counts", type=_counts, default=[1_000, 10_000, 100_000], help="pictures to fill a cache of")
    parser.add_argument("--workers", type=int, default=0, help="that read pictures while filling")
    parser.add_argument("--start", type=int, default=10_000, help="cached pictures of the second start")
    parser.add_argument("--pixels", type=int, default=512, help="of the step's pictures")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a step")
    parser.add_argument("--steps", type=int, default=5, help="of each kind")
    parser.add_argument(
        "--entries", type=int, default=4_000, help="cached pictures that the loader reads: 128 KiB each"
    )
    parser.add_argument("--root", type=Path, help="an existing folder to work in, and to leave everything in")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    options = parser.parse_args()
    if options.quick:
        options.counts, options.start, options.pixels = [], data_fill.A_FEW, 64
        options.steps, options.entries = 1, 64
    return options


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"got {text}; allowed are {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    main()
