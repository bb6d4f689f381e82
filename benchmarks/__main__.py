"""``python -m benchmarks overhead|peers|compression|diffusion|quality [--pairs N] [--batch B] [--rows NAME ...]``."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks import overhead, peers


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time ratios, measured in pairs.")
    parser.add_argument("what", choices=("overhead", "peers", "compression", "diffusion", "quality"))
    parser.add_argument("--pairs", type=int, default=20, help="interleaved pairs of steps (default 20)")
    parser.add_argument("--batch", type=int, default=64, help="images per step (default 64)")
    parser.add_argument("--rows", nargs="*", metavar="NAME", help="methods, tables or parts of it")
    parser.add_argument("--no-memory", action="store_true", help="of overhead and diffusion: skip the peak memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--seeds", type=int, default=3, help="of compression and quality (default 3)")
    parser.add_argument("--folder", type=Path, help="of compression and quality: their runs (default runs/WHAT)")
    args = parser.parse_args(arguments)
    if args.pairs < 1 or args.batch < 2:
        parser.error("--pairs must be at least 1 and --batch at least 2")
    folder = args.folder or Path("runs") / args.what
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if args.what == "compression":
        from benchmarks import compression

        print(aligned(compression.lines(compression.measure(folder, args.seeds, args.rows))))
        return 0
    if args.what == "quality":
        from benchmarks import quality

        found = quality.measure(folder, args.seeds)
        print("\n\n".join(aligned(quality.lines(found, metric)) for metric in ("fid", "kid")))
        print(*quality.pictures(folder, found), sep="\n")
        return 0
    if args.what == "diffusion":
        from benchmarks import diffusion

        results = diffusion.measure(args.pairs, args.batch, args.rows, not args.no_memory)
        print("\n\n".join(aligned(table) for table in diffusion.tables(results)))
        return _write(args, results)
    if args.what == "overhead":
        results = overhead.measure(args.pairs, args.batch, args.rows, not args.no_memory)
        lines = overhead.table(results)
    else:
        results = peers.measure(args.pairs, args.batch)
        lines = peers.table(results)
    print(aligned(lines))
    return _write(args, results)


def _write(args: argparse.Namespace, results: object) -> int:
    if args.out:
        from effdl.core.report import environment, write_report

        settings = {"pairs": args.pairs, "batch": args.batch}
        write_report(args.out, {"environment": environment(), "settings": settings, "rows": results})
    return 0


def aligned(lines: list[list[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
