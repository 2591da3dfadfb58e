"""The machines that programs can be compiled for without having them, and what is known of their chips."""

import dataclasses
import math
from pathlib import Path
import re

GIB, TERA = 2**30, 1e12
GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A chip, by its maker's figures: peaks, which programs come near to and do not pass."""

    name: str
    platform: str       # gpu or tpu
    memory: int         # bytes
    half_flops: float   # FLOP a second of matmuls of float16 or bfloat16, summed in float32, dense
    float_flops: float  # likewise of float32
    bandwidth: float    # bytes a second, of its memory
    near: float         # bytes a second that it sends, at once receiving as many, to chips of its host or slice
    far: float          # likewise to other hosts' chips, through a network
    source: str


_H100 = Accelerator("h100", "gpu", 84_929_347_584, 989 * TERA, 67 * TERA, 3.352e12, 450e9, 50e9,
                    "NVIDIA's data sheets of the H100 SXM and the DGX H100: NVLink 900 GB/s in both directions "
                    "together, a network of 400 Gb/s for each GPU; memory as XLA describes the card")

# A TPU's float32 product takes several passes of bfloat16 ones; six at the highest precision.
ACCELERATORS = {chip.name: chip for chip in (
    _H100,
    dataclasses.replace(_H100, name="h200", memory=150_754_820_096, bandwidth=4.8e12,
                        source="NVIDIA's data sheet of the H200 SXM; the chip is the H100's, with more memory"),
    Accelerator("v5e", "tpu", 16 * 10**9, 197 * TERA, 197 / 6 * TERA, 819e9, 200e9, 3.125e9,
                "Google Cloud's page of TPU v5e: 400 GB/s between chips in both directions together"),
    Accelerator("v5p", "tpu", 95 * 10**9, 459 * TERA, 459 / 6 * TERA, 2.765e12, 600e9, 6.25e9,
                "Google Cloud's page of TPU v5p: 4,800 Gb/s between chips"),
    Accelerator("v6e", "tpu", 32 * 10**9, 918 * TERA, 918 / 6 * TERA, 1.638e12, 400e9, 12.5e9,
                "Google Cloud's page of TPU v6e: 800 GB/s between chips in both directions together"),
)}

# Slices by the number in their names: chips, of v5p cores.
GRIDS = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8",
            1024: "8x8x8", 2048: "8x8x16", 4096: "8x16x16"},
}
GRIDS["v6e"] = GRIDS["v5e"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of chips, and how they are connected."""

    name: str
    chip: Accelerator
    topology: str   # as JAX's `get_topology_desc` takes it: of a GPU slices x hosts x GPUs, of a TPU its grid

    @property
    def chips(self):
        """How many there are."""
        return math.prod(int(n) for n in self.topology.split("x"))

    @property
    def near_chips(self):
        """How many of them reach one another without a network."""
        return min(self.chips, GPUS_PER_HOST) if self.chip.platform == "gpu" else self.chips

    @property
    def said(self):
        """What it is, in words."""
        if self.chip.platform == "gpu":
            _, hosts, each = self.topology.split("x")
            return f"{self.chips} {self.chip.name.upper()}, {hosts} x {each} (hosts x GPUs)"
        return f"{self.chips} {self.chip.name} chips, {self.topology}"


def get_target(name):
    """The Target of a name: h100x8 (chips), v5e-16 (chips), v5p-256 (cores, two a chip), or of a topology, h100:1x4x8
    (slices x hosts x GPUs), v5p:2x2x1. Raises ValueError."""
    found = re.fullmatch(r"([a-z]\w*?)(?:x(\d+)|-(\d+)|:(\d+(?:x\d+)+))", name)
    chip = found and ACCELERATORS.get(found[1])
    if not chip or (found[2] and chip.platform != "gpu") or (found[3] and chip.platform != "tpu"):
        raise ValueError(f"target {name!r} is unknown; allowed: {ALLOWED}")
    if found[4]:
        axes = found[4].count("x") + 1
        if axes != (3 if found[1] not in ("v5e", "v6e") else 2) or "0" in found[4].split("x"):
            raise ValueError(f"target {name!r} has a topology of {axes} axes; allowed: {ALLOWED}")
        return Target(name, chip, found[4])
    if chip.platform == "tpu":
        grids = GRIDS[chip.name]
        if int(found[3]) not in grids:
            raise ValueError(f"target {name!r} is no slice; allowed: {chip.name}- with {', '.join(map(str, grids))}, "
                             f"or a topology such as {chip.name}:{grids[8]}")
        return Target(name, chip, grids[int(found[3])])
    count = int(found[2])
    if count < 1 or count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise ValueError(f"target {name!r} has {count} GPUs; allowed: 1 to {GPUS_PER_HOST}, or multiples of "
                         f"{GPUS_PER_HOST}")
    hosts = max(count // GPUS_PER_HOST, 1)
    return Target(name, chip, f"1x{hosts}x{count // hosts}")


ALLOWED = ("h100 or h200 with x and a number of GPUs (h100x8), v5e, v5p or v6e with - and the number in a slice's name "
           "(v5e-16, v5p-256), or a topology (h100:1x4x8: slices x hosts x GPUs; v5p:2x2x1)")


def description_of(chip):
    """What XLA wants to know of a GPU that is not there, as its text of a GpuTargetConfig."""
    text = (Path(__file__).parent / "h100.txtpb").read_text()
    for key, value in (("device_memory_size", chip.memory), ("memory_bandwidth", round(chip.bandwidth))):
        text = re.sub(rf"(\b{key}:) \d+", rf"\1 {value}", text)
    return text
