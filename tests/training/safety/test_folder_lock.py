"""Fault 28: a run folder has one writer at a time."""

import os
import subprocess
import sys

import pytest

from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.training.safety.folder_lock import only_writer

HOLD = """
import sys, time
from jaxrl_fp16.training.safety.folder_lock import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.fault(28)
def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    with only_writer(tmp_path):
        with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()}; allowed"):
            with only_writer(tmp_path):
                pass
    with only_writer(tmp_path):
        pass


@pytest.mark.fault(28)
def test_a_killed_writer_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"by process {holder.pid}"):
            with only_writer(tmp_path):
                pass
    finally:
        holder.kill()
        holder.communicate()
    with only_writer(tmp_path):
        pass
