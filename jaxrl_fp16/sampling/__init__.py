"""Sampling from the policy that is trained."""

from jaxrl_fp16.sampling.sampler import SamplingConfig, make_sampler
from jaxrl_fp16.sampling.stepwise import Sampled, make_stepwise_sampler

__all__ = ["Sampled", "SamplingConfig", "make_sampler", "make_stepwise_sampler"]
