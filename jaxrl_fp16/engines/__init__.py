"""Other engines as samplers: each a process of its own that is sent the weights, asked, and checked."""

from jaxrl_fp16.engines.answers import cut_at_stops, make_rollout
from jaxrl_fp16.engines.engine import PROBE_LENGTH, Engine
from jaxrl_fp16.engines.pipe import EngineError, EngineRefused
from jaxrl_fp16.engines.settings import KINDS, RolloutConfig, check_rank, check_sampling, find_python
from jaxrl_fp16.engines.sharing import Engines

__all__ = [
    "Engine",
    "EngineError",
    "EngineRefused",
    "Engines",
    "KINDS",
    "PROBE_LENGTH",
    "RolloutConfig",
    "check_rank",
    "check_sampling",
    "cut_at_stops",
    "find_python",
    "make_rollout",
]
