"""What crosses between devices, on 4 virtual devices, in a process of its own."""

import os
from pathlib import Path
import subprocess
import sys


def test_layouts_on_four_devices(quick_environment):
    flags = quick_environment["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).with_name("layouts.py")],
        text=True, capture_output=True, env=os.environ | quick_environment | {"XLA_FLAGS": flags},
        timeout=600,  # seconds; it only ends a hang, and a busy machine is slow
    )
    assert run.returncode == 0, run.stdout + run.stderr
