"""A disk that fills up at random offsets: one line, exit code 3, every older checkpoint restores bit by bit.

    JAX_PLATFORMS=cpu python benchmarks/reliability/disk_full.py [--count 30]

The run folder lies on a tmpfs of its own. While the run steps, or before it is resumed, a file takes all of the room
but a random number of bytes, so that the disk ends within a checkpoint or within a line of a log. Then the file goes,
and the run is resumed; at the end it is bitwise the one that was left alone. Needs the right to mount, as root or in
a user namespace (`unshare`); exits 2 where there is neither.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import time

from runs import (
    EVERY, PATIENCE, RUNS, arguments, checkpoint_differences, conclude, differences, finished_steps, started,
    undisturbed,
)

KEPT = 3
SIZE_MB = 64
STEPS_A_FILLING = 8
BEFORE = 0.2             # share of the fillings that are there before the run is resumed
IN_LOGS = 0.4            # share that leave a few lines of room, so that a log may meet the end first
LINES = 12 * 1024        # bytes; about four steps' lines


@contextlib.contextmanager
def small_disk(folder):
    """A tmpfs on `folder` while entered; exits 2 with a line where that is not allowed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(folder)],
                          text=True, capture_output=True)
    if done.returncode:
        print(f"disk_full: a tmpfs cannot be mounted here: {done.stderr.strip()}", file=sys.stderr)
        raise SystemExit(2)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def become_root_of_a_namespace():
    """Starts this script again where it may mount, if this user may not and the system lets it."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if os.geteuid() and shutil.which(command[0]) and not subprocess.run([*command, "true"]).returncode:
        os.execvp(command[0], [*command, sys.executable, *sys.argv])


def fill(disk, left):
    """Takes all room of `disk` but `left` bytes; gives the file to be removed."""
    path = disk / "filler"
    with open(path, "wb") as file:
        while True:
            room = os.statvfs(disk)
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - left))
                return path
            except OSError as error:        # the run took some of it meanwhile
                if error.errno != errno.ENOSPC:
                    raise


def room_to_leave(generator, checkpoint_bytes):
    return generator.randint(0, LINES if generator.random() < IN_LOGS else checkpoint_bytes)


def bytes_of(checkpoint):
    return sum(path.stat().st_blocks * 512 for path in checkpoint.rglob("*") if path.is_file())


def one_filling(number, run, disk, expected, work, steps, generator):
    """`(figures, problems)`: fills the disk, waits for the run to end, looks at what is left, and empties the disk."""
    folder = disk / "run"
    left = room_to_leave(generator, bytes_of(expected / "checkpoints" / str(EVERY)))
    before = number > 0 and generator.random() < BEFORE
    filler = fill(disk, left) if before else None
    known = finished_steps(folder)
    with started(run, folder, work, steps, **{"checkpoint.keep": KEPT}) as life:
        if not before:
            wanted = (known or [EVERY])[-1] + generator.randint(1, EVERY)
            life.wait_until(lambda: (life.last_step() or 0) >= wanted and finished_steps(folder))
            time.sleep(generator.uniform(0, 0.03))
            known, filler = finished_steps(folder), fill(disk, left)
        code = life.process.wait(PATIENCE)
    error, after = life.errors().strip(), finished_steps(folder)
    problems = []
    if code != 3:
        problems.append(f"ended with {code}")
    if len(error.splitlines()) != 1 or "Traceback" in error:
        problems.append(f"{len(error.splitlines())} lines on stderr: {error[-500:]}")
    if not after or len(after) < min(len(known), KEPT):
        problems.append(f"of the checkpoints {known} there is {after}")
    problems += [line for step in after for line in checkpoint_differences(folder, expected, step)]
    filler.unlink()
    figures = {"before_the_start": before, "in_a_save": "could not be written" in error, "checkpoints": len(after)}
    return figures, [f"filling {number}, {left} bytes left{', before the start' if before else ''}: {text}"
                     for text in problems]


def main():
    parser = arguments(__doc__, 30, "disk_full")
    parser.add_argument("--steps", type=int, help="of the run; by default enough for its fillings")
    parser.add_argument("--run", choices=list(RUNS), default="grpo")
    given = parser.parse_args()
    began, work, generator = time.monotonic(), given.work.resolve(), random.Random(given.seed)
    steps = given.steps or STEPS_A_FILLING * given.count + 4 * EVERY
    with small_disk(work / "disk") as disk:
        expected, folder = undisturbed(given.run, work, steps), disk / "run"
        seen, problems = [], []
        for number in range(given.count):
            figures, found = one_filling(number, given.run, disk, expected, work, steps, generator)
            seen.append(figures)
            problems += found
        with started(given.run, folder, work, steps) as life:
            code = life.process.wait(600)
        found = [f"the last life ended with {code}: {life.errors()}"] if code else differences(folder, expected)
        problems += found
    rows = [{
        "run": given.run, "fillings": len(seen), "in_a_save": sum(one["in_a_save"] for one in seen),
        "elsewhere": sum(not one["in_a_save"] for one in seen),
        "before_the_start": sum(one["before_the_start"] for one in seen),
        "checkpoints_restored": sum(one["checkpoints"] for one in seen), "bitwise_equal_at_the_end": not found,
    }]
    facts = {"seed": given.seed, "disk_mb": SIZE_MB, "seconds": time.monotonic() - began}
    return conclude("disk_full", rows, facts, problems, given.out)


if __name__ == "__main__":
    become_root_of_a_namespace()
    sys.exit(main())
