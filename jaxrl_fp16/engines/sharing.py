"""The engine that all samplers of a command share."""

from jaxrl_fp16.engines.engine import Engine
from jaxrl_fp16.engines.pipe import EngineRefused
from jaxrl_fp16.engines.settings import find_python


class Engines:
    """The engine of a command, started when a first sampler needs it and shared by all of them; closed by its owner.

    A sampler of another engine or dtype, as `mismatch` has them one after another, ends the one before it.
    """

    def __init__(self, say):
        self._say, self._engine = say, None

    def get(self, config, model, settings):
        """The `Engine` of a RolloutConfig, for `model`. Raises EngineRefused where its interpreter does not do."""
        found = self._engine
        if found is None or (found.name, found.dtype) != (config.engine, settings["dtype"]):
            self.close()
            try:
                python = find_python(config, model.lora is not None)
            except ValueError as error:
                raise EngineRefused(str(error)) from error
            self._engine = Engine(config, python, model, settings, self._say)
        return self._engine

    def close(self):
        """Ends the engine, if there is one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def facts(self):
        """Of the engine that is open: its name, the dtype seen on its parameters, versions of its libraries."""
        return {} if self._engine is None else {"name": self._engine.name, **self._engine.facts}

    def metrics(self):
        """Of the engine that drew last: `rollout/version` of its weights, `rollout/restarts` so far, `seconds/weights`
        that the latest took on their way. Nothing where none is open."""
        found = self._engine
        return {} if found is None else {"rollout/version": found.version, "rollout/restarts": found.restarts,
                                         "seconds/weights": found.seconds}
