"""The update and the sampler on 4 virtual devices, in a process of its own."""

import os
from pathlib import Path
import subprocess
import sys


def test_on_four_devices(quick_environment):
    flags = quick_environment["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    tests = Path(__file__).with_name("four_devices.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests], text=True, capture_output=True,
        env=os.environ | quick_environment | {"XLA_FLAGS": flags},
        timeout=600,  # seconds; it only ends a hang, and a busy machine is slow
    )
    assert run.returncode == 0, run.stdout + run.stderr
