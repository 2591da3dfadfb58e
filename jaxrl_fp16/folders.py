"""The local folder that a user names."""

import os
from pathlib import Path
import re

# A model's name on the Hub, or its page there; a relative path may look the same.
HUB_NAME = re.compile(r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?([\w-][\w.-]*/[\w-][\w.-]*)/?")


def local_folder(folder, kind="model"):
    """The Path of a folder that is there, `~` expanded. kind: whose folder, for the ValueError that tells what is."""
    given = os.path.expanduser(folder)
    path = Path(given)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; allowed: the {kind} folder that it lies in, {path.parent}")
    named = HUB_NAME.fullmatch(os.fspath(folder))
    fetch = f"; if it is a name on the Hub, fetch it: `hf download {named[1]} --local-dir FOLDER`" if named else ""
    raise ValueError(f"{kind} folder {given} does not exist; allowed: a local folder, nothing is downloaded{fetch}")
