"""`plan`: a config's programs, compiled for a machine that is not there: what fits, what crosses the wires."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
from pathlib import Path

from jaxrl_fp16.config import ConfigError, naming, to_dict
from jaxrl_fp16.console import Console
from jaxrl_fp16.logs import write_json
from jaxrl_fp16.plan.compilers import CompileError, compile_program, find_compiler, has_cudnn
from jaxrl_fp16.plan.meshes import meshes_for, microbatch_for
from jaxrl_fp16.plan.page import advice, answer, tables, write_plan
from jaxrl_fp16.plan.programs import names_of
from jaxrl_fp16.plan.reckoning import carried_on, moved_in_step, needs_of, seconds_of
from jaxrl_fp16.plan.targets import ALLOWED, get_target

DEPTHS = 2, 4   # layers that are compiled of a deep sampler, whose decode step is as long as the model is deep
DEEP = 8        # layers; a sampler of more is carried on from those
AT_ONCE = 2     # compilers


def run_plan(config):
    """Writes the page, and prints its answer and tables."""
    section, log = config.plan, Console()
    if section.target is None:
        raise ConfigError(f"plan.target is not given: --target TARGET; allowed: {ALLOWED}")
    with naming("plan.target"):
        target = get_target(section.target)
    with naming("plan"):
        compiler = find_compiler(target.chip.platform)
    config, notes = _as_compiled(config, target, compiler)
    folder = Path(section.output or Path(config.run.dir) / f"plan-{config.run.name}-{target.name.replace(':', '-')}")
    plain = to_dict(dataclasses.replace(config, plan=type(section)()))
    planned = _Plan(plain, target, section.seconds, log)
    try:
        with naming("plan"):
            facts = planned.facts()
            found, more = planned.programs(names_of(config), facts)
            searched = planned.search(config, facts) if section.search else {}
    except CompileError as error:
        raise ConfigError(f"plan: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    notes += [*more, _assumptions(target), *_kernels(found), *_otherwise(found), *_spent(planned)]
    page = write_plan(folder / "plan.html", config.run.name, found, facts, target, searched, notes)
    write_json(folder / "plan.json", {
        "target": target.name, "chips": target.chips, "facts": facts, "answer": list(answer(found, facts, target)),
        "advice": list(advice(found, facts, target)),
        "programs": {name: {**each, "wires": None, "moved": each["moved"],
                            "needs": needs_of(name, each, facts)} for name, each in found.items()},
        "moved": {" ".join(key): size for key, size in moved_in_step(found, facts).items()},
        "seconds": {name: seconds_of(name, each, facts, target) for name, each in found.items()},
        "search": {"x".join(map(str, mesh)): each for mesh, each in searched.items()},
    })
    for title, table in zip(("memory, GiB", "wires", "seconds a step, at best"), tables(found, facts, target)):
        log.table(title, table.columns, table.rows)
    for line in (*answer(found, facts, target), *advice(found, facts, target)):
        log.say(line)
    log.say(f"page: {page}")
    return 0


class _Plan:
    """A config's programs for a target, compiled a few at a time."""

    def __init__(self, config, target, seconds, log):
        self.config, self.target, self.seconds, self.log = config, target, seconds, log
        self.spent = {}

    def facts(self):
        """`facts_of` the run; what is wrong with the config is refused here."""
        with self.log.announce(f"looking at {self.target.said}"):
            return self._compile(None)["facts"]

    def programs(self, names, facts):
        """`(summaries by program, notes)`."""
        deep = facts["layers"] > DEEP
        jobs = [(name, depth) for name in names for depth in (DEPTHS if name == "sampler" and deep else (None,))]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            done = list(pool.map(lambda job: self._told(*job), jobs))
        found = {}
        for (name, depth), summary in zip(jobs, done):
            before = found.get(name)
            found[name] = summary if before is None else carried_on(before, summary, facts["layers"])
        few, more = DEPTHS
        return found, [f"The sampler was compiled with {few} and with {more} layers; its figures for {facts['layers']} "
                       "lie on the line through those."] if deep and "sampler" in names else []

    def search(self, config, facts):
        """The update on several meshes."""
        own = tuple(facts["mesh"].values())
        rows = (config.training.minibatch_size, config.training.prompts_per_step)
        meshes = meshes_for(self.target.chips, self.target.near_chips, own, rows, facts["kv_heads"])
        with ThreadPoolExecutor(AT_ONCE) as pool:
            done = list(pool.map(self._on_mesh, meshes))
        return {mesh: each if isinstance(each, str) else self._reckoned(each, mesh) for mesh, each in zip(meshes, done)}

    def _reckoned(self, summary, mesh):
        facts = summary["facts"]
        return {"needs": sum(needs_of("update", summary, facts).values()), "micro": self._micro(mesh),
                "moved": sum(moved_in_step({"update": summary}, facts).values()),
                "seconds": seconds_of("update", summary, facts, self.target)}

    def _micro(self, mesh):
        t = self.config["training"]
        return microbatch_for(mesh, t["microbatch_size"], t["minibatch_size"])

    def _on_mesh(self, mesh):
        axes = dict(zip(("data", "fsdp", "tensor"), mesh))
        config = {**self.config, "mesh": {**self.config["mesh"], **axes},
                  "training": {**self.config["training"], "microbatch_size": self._micro(mesh)}}
        try:
            return self._told("update", None, config, f" on {' x '.join(map(str, mesh))}")
        except (CompileError, ValueError) as error:
            return str(error)

    def _told(self, program, layers, config=None, where=""):
        self.log.say(f"compiling the {program}{where}{f', {layers} layers' if layers else ''}")
        found = self._compile(program, layers, config)
        self.spent[program, where, layers] = found["seconds"]
        return found

    def _compile(self, program, layers=None, config=None):
        return compile_program(config or self.config, self.target, program, layers, seconds=self.seconds)


def _as_compiled(config, target, compiler):
    """`(config, notes)`: the config as it can be compiled here."""
    model, notes = config.model, []
    if config.rollout.engine != "jit":
        notes.append(f"{config.rollout.engine} samples in a process of its own, which is not looked at.")
    if target.chip.platform == "gpu" and model.attention in ("auto", "cudnn") and not has_cudnn(compiler):
        config = dataclasses.replace(config, model=dataclasses.replace(model, attention="blockwise"))
        notes.append("NVIDIA's attention kernel needs its library to be compiled, which is not installed here: "
                     "blockwise was compiled instead.")
    return config, notes


def _assumptions(target):
    return (
        f"{target.said}. Memory, collectives and shapes are those of the programs as XLA compiled them for it, "
        "at the full width of every row; nothing ran. Arithmetic is reckoned: 2 FLOP a parameter and position forward, "
        "4 backward, 2 more where a layer is computed again, and attention. Decoding reads weights and, on average, "
        "half of the cache's responses at each step. A collective is a ring: an all-reduce sends its bytes twice."
    )


def _kernels(found):
    for each in found.values():
        if each["decode"]:
            yield (f"A decode step starts {each['decode']['kernels']:,.0f} kernels. Each takes some microseconds to "
                   f"start, whatever it does, which the seconds leave out: a small model waits for nothing else.")


def _otherwise(found):
    names = [name for name, each in found.items() if each["otherwise"]]
    if names:
        yield (f"XLA's own generator of matmuls did not take the {' and the '.join(names)} without a card to tune it "
               "on: compiled with cuBLAS's.")


def _spent(planned):
    yield "CPU seconds of compiling: " + ", ".join(
        f"{program}{where}{f', {layers} layers' if layers else ''} {seconds:,.0f}"
        for (program, where, layers), seconds in planned.spent.items()) + "."
