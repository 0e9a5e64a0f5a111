"""Watch a run of toolkit.distill that goes on in another window, or look at one that is over.

examples:
  python -m toolkit.watch runs/model-progressive-4
  python -m toolkit.watch runs/model-progressive-4 --port 8123
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .command import print_json, run
from .diffusion.errors import BadInput
from .evaluation.watch import RunServer

log = logging.getLogger("fewstep")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.watch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="DIR", help="the run's folder")
    parser.add_argument("--port", type=int, default=0, help="on this machine (default: a free one)")
    parser.add_argument("--json", action="store_true", help="machine-readable answer on stdout")
    asked = parser.parse_args()
    if not (asked.out / "config.toml").exists():
        raise BadInput(f"{asked.out} holds no run (no config.toml in it); give the folder of one")
    try:
        server = RunServer(asked.out, asked.port)
    except (OSError, OverflowError) as error:
        raise BadInput(f"--port {asked.port}: cannot be used ({error}); leave it out") from None
    log.info("watch the run at %s (Ctrl+C ends this)", server.address)
    if asked.json:
        print_json({"address": server.address})
    server.serve_forever()


if __name__ == "__main__":
    run(main)
