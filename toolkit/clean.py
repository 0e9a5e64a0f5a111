"""Delete caches that no unfinished run needs: ``python -m toolkit.clean --help``."""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from .command import print_json, run
from .diffusion.errors import BadInput
from .training.caches import find_caches, unfinished_runs
from .training.memory import size

log = logging.getLogger("fewstep")

EXAMPLES = """examples:
  python -m toolkit.clean
  python -m toolkit.clean --delete
  python -m toolkit.clean --cache-dir D:/cache --runs D:/runs --older-than 30 --delete

A later run with the same teacher, prompts and sizes would find a cache and save the time of making it; a run
whose cache is gone makes it anew. Only folders that toolkit.distill makes for itself are looked at: students,
reports and states are left alone.
"""
DAY = 24 * 3600


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    if asked.older_than < 0:
        raise BadInput(f"--older-than {asked.older_than:g}: expected days, 0 or more")
    caches = find_caches(asked.cache_dir, unfinished_runs(asked.runs))
    latest = time.time() - DAY * asked.older_than
    going = [cache for cache in caches if not cache.needed_by and cache.used <= latest]
    for cache in caches:
        why = f"needed by {', '.join(cache.needed_by)}" if cache.needed_by else "can go"
        if not cache.needed_by and cache not in going:
            why = f"younger than {asked.older_than:g} days"
        log.info("%s  %9s  %s", cache.folder.name, size(cache.bytes), why)
    freed = sum(cache.bytes for cache in going)
    if asked.delete:
        for cache in going:
            try:
                shutil.rmtree(cache.folder)
            except OSError as error:
                raise BadInput(f"{cache.folder}: cannot be deleted ({error.strerror})") from None
        log.info("%s freed", size(freed))
    else:
        log.info("%s can be freed; --delete does it", size(freed))
    if asked.json:
        rows = [
            {
                "name": cache.folder.name,
                "bytes": cache.bytes,
                "needed_by": cache.needed_by,
                "deleted": asked.delete and cache in going,
            }
            for cache in caches
        ]
        print_json({"cache_dir": str(asked.cache_dir), "caches": rows, "bytes": freed})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.clean",
        description="Say which caches no unfinished run needs, and delete them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cache-dir", type=Path, default=Path("runs/cache"), metavar="DIR", help="default: runs/cache")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs lie (default: runs)")
    add("--older-than", type=float, default=0, metavar="DAYS", help="only caches of before (default: 0)")
    add("--delete", action="store_true", help="delete them; without it they are only told")
    add("--json", action="store_true", help="machine-readable answer on stdout")
    return parser


if __name__ == "__main__":
    run(main)
