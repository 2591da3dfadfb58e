"""Sampling from the policy that is trained."""

from jaxrl_fp16.sampling.sampler import SamplingConfig, make_sampler

__all__ = ["SamplingConfig", "make_sampler"]
