"""The far side of `peer.py`, for scripts that another interpreter runs: the standard library only."""

import json
import os
import resource
import sys
import time


class Turns:
    """Takes a turn when a line comes on the standard input, and answers with what it took, a line of JSON.

    What libraries print goes to the standard error. settings: the keywords that `Peer` was given.
    """

    def __init__(self):
        self._replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.settings = json.loads(sys.stdin.readline())

    def start(self):
        """Waits for the turn, and starts the clock. The process ends where no more turns come."""
        if not sys.stdin.readline():
            raise SystemExit(0)
        self._began = time.process_time(), time.perf_counter()

    def end(self, work):
        """Stops the clock; work: what was done, in the benchmark's unit."""
        cpu, wall = self._began
        spent = {"work": work, "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall,
                 "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        self._replies.write(json.dumps(spent) + "\n")
