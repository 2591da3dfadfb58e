"""Writes what README.md lists of the code between its marks: families, tasks, commands, configs.

    python docs/derive.py
    python docs/derive.py --check    exit code 1 where it is not up to date

A passage is between `<!-- NAME: start -->` and `<!-- NAME: end -->`, each on a line of its own.
"""

import argparse
from pathlib import Path
import re
import sys

from jaxrl_fp16.cli import COMMANDS
from jaxrl_fp16.models import FAMILIES
from jaxrl_fp16.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"


def families():
    """Every model family."""
    return ", ".join(f"`{name}`" for name in FAMILIES)


def tasks():
    """Every task with what it is."""
    return "\n".join(f"- `{name}`: {kind.about}" for name, kind in TASKS.items())


def commands():
    """Every command with what it does."""
    return table(("command", "what it does"), ((f"`{name}`", text) for name, text in COMMANDS.items()))


def configs():
    """Every config with the comment at its top."""
    rows = ((f"`configs/{path.name}`", title(path)) for path in sorted((ROOT / "configs").glob("*.yaml")))
    return table(("file", "what it runs"), rows)


def title(path):
    """The first sentence of a file's comment."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    text = " ".join(lines)
    return text.partition(". ")[0].rstrip(".") + (" (not yet run)" if "NOT YET RUN" in text else "")


def table(heads, rows):
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


PASSAGES = {function.__name__: function for function in (families, tasks, commands, configs)}


def derived(text):
    """A page's text with its passages written anew; others are other scripts'."""
    def fill(match):
        if match[2] not in PASSAGES:
            return match[0]
        return f"{match[1]}\n{PASSAGES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- (\w+): start -->)\n(?:.*?\n)??(<!-- \2: end -->)", fill, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check, text = parser.parse_args().check, PAGE.read_text()
    fresh = derived(text)
    if not check:
        PAGE.write_text(fresh)
    elif fresh != text:
        print(f"{PAGE.name} is not up to date")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
