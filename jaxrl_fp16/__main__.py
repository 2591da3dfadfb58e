"""`python -m jaxrl_fp16`: the same as the console script `jaxrl-fp16`."""

from jaxrl_fp16.cli import entry

if __name__ == "__main__":
    entry()
