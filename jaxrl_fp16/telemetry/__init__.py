"""Ranges of weights, activations and gradients: the programs that measure them, and what is reported of them."""

from jaxrl_fp16.telemetry.readings import (
    TelemetryConfig, by_tensor, first_beyond, first_overflow, largest, margin, name_not_finite, summarize,
    underflow_share, weight_shares,
)

__all__ = [
    "TelemetryConfig", "by_tensor", "first_beyond", "first_overflow", "largest", "margin", "name_not_finite",
    "summarize", "underflow_share", "weight_shares",
]
