"""YAML files and a command line into nested frozen dataclasses, every value checked; imports no JAX."""

from jaxrl_fp16.config.load import load_config, load_unchecked, parse_config, parse_overrides
from jaxrl_fp16.config.refusals import ConfigError, naming, naming_at_entry
from jaxrl_fp16.config.schema import Doc, Field, describe, diff, to_dict, to_yaml

__all__ = [
    "ConfigError", "Doc", "Field", "describe", "diff", "load_config", "load_unchecked", "naming", "naming_at_entry",
    "parse_config", "parse_overrides", "to_dict", "to_yaml",
]
