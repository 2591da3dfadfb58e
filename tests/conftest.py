"""Skips what this machine cannot run, with the reason."""

import pytest


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    import jax  # only where a test asks for it: a JAX that knows its devices cannot be configured any more

    try:
        jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"needs an NVIDIA GPU: {str(error).splitlines()[0]}")
