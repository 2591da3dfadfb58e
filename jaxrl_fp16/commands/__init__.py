"""The commands, one a file: `commands/NAME.py` has `run_NAME(config) -> exit code`."""
