"""What one model family is: data, in a file of its own.

A family maps Hugging Face's `config.json` to our fields and back, and lists its
tensors. One table serves loading, saving and sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

Axes = tuple[str | None, ...]

# How an array there is laid out in terms of one here: for each axis there, the axes here that it
# merges. "same" keeps every axis. PyTorch stores a linear layer as [out, in] and all heads as one axis.
TRANSFORMS = {
    "same": None,
    "transpose": ((1,), (0,)),
    "to_heads": ((1, 2), (0,)),
    "from_heads": ((2,), (0, 1)),
    "bias_of_heads": ((0, 1),),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint ("there") and its place in our parameters ("here").

    name: its name there; `{layer}` where each layer has one of its own.
    path: its place here; layers are stacked along a leading axis.
    axes: logical axes of the array here, the stacking axis left out.
    kind: how the two are laid out (a key of TRANSFORMS).
    The methods are about one layer: shapes and indices are without the stacking axis.
    """

    name: str
    path: tuple[str, ...]
    axes: Axes
    kind: str = "same"

    @property
    def stacked(self):
        return "{layer}" in self.name

    @property
    def groups(self):
        """For each axis there, the axes here that it merges."""
        return TRANSFORMS[self.kind] or tuple((axis,) for axis in range(len(self.axes)))

    def names(self, num_layers):
        """Its names there, by layer."""
        return [self.name.format(layer=i) for i in range(num_layers)] if self.stacked else [self.name]

    def shape_there(self, shape):
        """The shape there of an array whose shape here is `shape`."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.groups)

    def index_there(self, index, shape):
        """Slices there for slices here; of merged axes only the first may be cut."""
        slices = []
        for first, *rest in self.groups:
            inner = math.prod(shape[axis] for axis in rest)
            if any(index[axis] != slice(0, shape[axis]) for axis in rest):
                raise ValueError(f"{self.name} is cut along {self.axes}; allowed: whole heads")
            slices.append(slice(index[first].start * inner, index[first].stop * inner))
        return tuple(slices)

    def as_there(self, array):
        """An array here as it stands there. Of a contiguous NumPy array a view: filling it fills `array`."""
        order = [axis for group in self.groups for axis in group]
        return array.transpose(order).reshape(self.shape_there(array.shape))


@dataclasses.dataclass(frozen=True)
class Family:
    """name: `model_type` of config.json.  defaults: of `DecoderConfig` fields left None.
    read: config.json -> fields.  write: DecoderConfig -> config.json.  tensors: DecoderConfig -> table.
    Both `read` and `write` raise ValueError for what the other side cannot express."""

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[dict], dict]
    write: Callable[[Any], dict]
    tensors: Callable[[Any], list[Tensor]]

    @property
    def classifier(self):
        """The architecture of the same body with a head of scores in place of the language model's."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")


__all__ = ["Axes", "TRANSFORMS", "Tensor", "Family"]
