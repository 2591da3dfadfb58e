"""Adapters on 4 virtual devices, in a process of its own."""

from pathlib import Path


def test_on_four_devices(on_four_devices):
    on_four_devices(Path(__file__).with_name("lora_four_devices.py"))
