"""Skips what this machine cannot run, with the reason; what the tests of whole runs share."""

from html.parser import HTMLParser
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

# A run of seconds: a random model of 16,000 parameters on sums of two digits.
TINY = {
    "run": {"steps": 2},
    "model": {"family": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2,
              "num_kv_heads": 1, "head_dim": 16, "tie_embeddings": True},
    "task": {"arithmetic": {"kinds": ["add"], "digits": 1}, "train_size": 64, "heldout_size": 6},
    "sampling": {"max_new_tokens": 4, "group_size": 4},
    "optimizer": {"learning_rate": 1e-2},
    "training": {"prompts_per_step": 8, "minibatch_size": 16, "microbatch_size": 8, "max_prompt_tokens": 6,
                 "truncated": "keep"},
    "sft": {"batch_size": 16, "microbatch_size": 16, "max_length": 10, "optimizer": {"learning_rate": 1e-2}},
    "checkpoint": {"every": 1, "keep": 9},
}


# What compiles whole models or starts processes, by folder or file: `launch/test.sh --fast` leaves it out.
SLOW = """
commands lab/mismatch models parallel telemetry training/checkpoints training/updates
training/loops/test_mismatch_terms training/rollouts/test_reward_model training/rollouts/test_evaluate
training/rollouts/test_engine training/runs/test_setup test_finite
sampling/test_agreement sampling/test_cache sampling/test_lora_sampling sampling/test_sampler
objectives/test_losses objectives/test_preference objectives/test_properties tasks/test_math_task tasks/grading
test_api test_benchmarks test_forward test_jaxprs test_real_data test_refusals test_reliability_scripts
test_sanity_configs test_security
""".split()


def pytest_collection_modifyitems(items):
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
        if any(f"{path}/".startswith(f"{place}/") for place in SLOW):
            item.add_marker("slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by launch/test.sh --fast")
    config.addinivalue_line("markers", "fault(row): the row of docs/reliability.md's table that the test injects")


def pytest_runtest_setup(item):
    if item.get_closest_marker("vllm") is not None and not os.environ.get("JAXRL_FP16_VLLM_PYTHON"):
        pytest.skip("JAXRL_FP16_VLLM_PYTHON names no interpreter that has vLLM")
    if item.get_closest_marker("gpu") is None:
        return
    import jax  # only where a test asks for it: a JAX that knows its devices cannot be configured any more

    try:
        jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"needs an NVIDIA GPU: {str(error).splitlines()[0]}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The file with TINY's config."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def quick_option():
    """XLA's option that leaves out its fusion emitters for CPUs, half of a compilation; {} where it has none."""
    import jax

    option = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=option).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return option


@pytest.fixture(scope="module")
def one_torch_thread():
    """PyTorch on one thread: others would wait for each other on cores that workers share."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quick_compile(quick_option):
    """XLA leaves most optimizations out: for programs whose speed and last bits are no matter of the test."""
    import jax
    from jax._src import compiler    # no public name reaches every program of a module, and those alone

    get_options, before = compiler.get_compile_options, jax.config.read("jax_disable_most_optimizations")

    def get_quick_options(*args, **kwargs):
        options = get_options(*args, **kwargs)
        options.env_option_overrides = [*options.env_option_overrides, *quick_option.items()]
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_quick_options)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """JAX keeps the fast paths of 8,192 calls in a process; with as many alive a later function gets none, is slower
    and has a `_cache_size` of 0. A worker of the whole suite comes to that."""
    yield
    FILES.append(1)
    if len(FILES) % 20 == 0 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


FILES = []  # of tests that this process is done with


@pytest.fixture(scope="session")
def quick_environment(quick_option):
    """What makes a process of its own compile in this way: environment variables."""
    own = (f"--{name}={str(value).lower()}" for name, value in quick_option.items())
    flags = [os.environ.get("XLA_FLAGS", ""), *own]
    return {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(flags)}


@pytest.fixture(scope="session")
def on_four_devices(quick_environment):
    """on_four_devices(path): the tests of a file pass in a process of its own, which has 4 virtual devices."""
    def run(path):
        flags = quick_environment["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path], text=True, capture_output=True,
            env=os.environ | quick_environment | {"XLA_FLAGS": flags},
            timeout=600,  # seconds; it only ends a hang, and a busy machine is slow
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    return run


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder for compiled programs; the worker processes of one pytest share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def compile_cache(compiled, quick_compile):
    """The folder for `run.compile_cache` that keeps the small programs too; JAX's settings are put back afterwards."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
    names = [*wanted, "jax_compilation_cache_dir", "jax_platforms"]
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield str(compiled)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


# -- pages ---------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """A page's tags and texts, in their order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(" ".join(data.split()))


@pytest.fixture(scope="session")
def read_page():
    """read_page(path) -> what is `Seen` in a page, which runs nothing and fetches nothing."""

    def read(path):
        page = path.read_text()
        seen = Seen(page)
        assert not {"script", "link", "iframe", "object"} & set(seen.tags) and "url(http" not in page
        assert all(address.startswith(("#", "data:")) for address in seen.addresses)
        return seen

    return read
