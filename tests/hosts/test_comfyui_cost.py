"""A student's steps in ComfyUI cost as many evaluations of its UNet, and hardly more than the host's own."""

import json
import os
import statistics
import subprocess
from pathlib import Path

from hosts.comfyui import SITE, Host
from hosts.models import Models

ROOT = Path(__file__).resolve().parents[2]


def test_four_steps_cost_four_evaluations_and_what_the_hosts_own_euler_adds(
    comfyui_host: Host, models: Models
) -> None:
    script = Path(__file__).with_name("measure_sampling.py")
    packages = [SITE, *comfyui_host.packages]
    done = subprocess.run(
        [str(comfyui_host.python), str(script), str(ROOT), str(models.epsilon.path), "9"],
        cwd=comfyui_host.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, packages))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {
        name: statistics.median(times) for name, times in json.loads(done.stdout.splitlines()[-1]).items()
    }
    assert found["student"] <= 1.05 * found["bare"] + (found["stock"] - found["bare"]), found
