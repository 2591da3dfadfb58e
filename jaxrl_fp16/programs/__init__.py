"""What XLA has made of a program."""

from jaxrl_fp16.programs.hlo import COLLECTIVES, Instruction, array_bytes, collectives, read

__all__ = ["COLLECTIVES", "Instruction", "array_bytes", "collectives", "read"]
