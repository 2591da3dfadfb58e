"""A folder's checksums, so that a damaged file is noticed before its numbers are used."""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Writes the BLAKE2 of every file in the folder, by its path inside it, to its `manifest.json`.

    All of them are on the disk when it returns: what is named after that outlives a loss of power.
    """
    (folder / NAME).write_text(json.dumps(_digests(folder), indent=1), encoding="utf-8")
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find_damage(folder: Path) -> str:
    """What is wrong with the folder's files (missing, added, changed); empty if nothing is."""
    try:
        written = dict(json.loads((folder / NAME).read_text(encoding="utf-8")))
        found = _digests(folder)
    except (OSError, ValueError, TypeError) as error:
        return f"{NAME} cannot be read ({type(error).__name__})"
    wrong = [name for name in sorted({**written, **found}) if written.get(name) != found.get(name)]
    return f"{wrong[0]} is not what was written" if wrong else ""


def is_as_written(folder: Path, name: str) -> bool:
    """Whether one file of the folder is there as the manifest has it."""
    try:
        written = dict(json.loads((folder / NAME).read_text(encoding="utf-8")))
        return name in written and written[name] == _digest(folder / name)
    except (OSError, ValueError, TypeError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:      # hashing lets go of the interpreter's lock
        digests = list(pool.map(_digest, files))
    return {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, digests)}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
