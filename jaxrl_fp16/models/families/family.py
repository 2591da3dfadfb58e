"""What one model family is: data, in a file of its own.

A family maps Hugging Face's `config.json` to our fields and back, and lists its
tensors. One table serves loading, saving and sharding.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from flax import linen as nn
import numpy as np

Axes = tuple[str | None, ...]

# How a Hugging Face tensor is laid out in terms of our array: for each of its axes, those of ours that it
# merges. "same" keeps every axis. PyTorch stores a linear layer as [out, in] and all heads as one axis.
TRANSFORMS = {
    "same": None,
    "transpose": ((1,), (0,)),
    "to_heads": ((1, 2), (0,)),
    "from_heads": ((2,), (0, 1)),
    "bias_of_heads": ((0, 1),),
}


COUNTED = ("layer", "expert")  # what a tensor's name may count, in the order of our arrays' leading axes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row of a family's table: tensors of a Hugging Face folder, and the array of our parameters that holds them.

    name: of the tensors; with `{layer}`, and within it `{expert}`, where there is one for each. Our array stacks
      those along leading axes, layers first.
    path: our array's place in the parameters.
    axes: logical axes of our array, without the leading ones.
    kind: how the two are laid out (a key of TRANSFORMS).
    The `hf_` methods are about one tensor: shapes and indices are without the leading axes.
    """

    name: str
    path: tuple[str, ...]
    axes: Axes
    kind: str = "same"

    @property
    def counted(self):
        """What its name counts, in the order of our array's leading axes: names out of COUNTED."""
        return tuple(each for each in COUNTED if f"{{{each}}}" in self.name)

    @property
    def groups(self):
        """For each axis of a tensor, the axes of ours that it merges."""
        return TRANSFORMS[self.kind] or tuple((axis,) for axis in range(len(self.axes)))

    @property
    def linear(self):
        """The name of the linear layer whose kernel this is, as `q_proj`; None of another tensor."""
        return self.name.split(".")[-2] if self.path[-1] == "kernel" and self.counted else None

    def entries(self, shape):
        """`[(index, name)]` of all its tensors: the place of each along the leading axes of our array of `shape`."""
        counts = shape[:len(self.counted)]
        return [(index, self.name.format(**dict(zip(self.counted, index)))) for index in np.ndindex(*counts)]

    def hf_shape(self, shape):
        """The tensor's shape, where ours is `shape`."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.groups)

    def hf_index(self, index, shape):
        """Slices of the tensor for slices of ours; of merged axes only the first may be cut."""
        slices = []
        for first, *rest in self.groups:
            inner = math.prod(shape[axis] for axis in rest)
            if any(index[axis] != slice(0, shape[axis]) for axis in rest):
                raise ValueError(f"{self.name} is cut along {self.axes}; allowed: whole heads")
            slices.append(slice(index[first].start * inner, index[first].stop * inner))
        return tuple(slices)

    def to_hf(self, array):
        """Our array as the tensor is laid out. Of a contiguous NumPy array a view: filling it fills `array`."""
        order = [axis for group in self.groups for axis in group]
        return array.transpose(order).reshape(self.hf_shape(array.shape))


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What a family's attention is made of."""

    heads: int          # of queries
    kv_heads: int       # of keys and values; divides heads
    head_dim: int
    qkv_bias: bool      # on query, key and value projections
    output_bias: bool   # on the output projection
    qk_norm: bool       # RMSNorm on each query and key head
    rotary_scale: float = 1.0  # of rotated queries and keys: YaRN's attention factor

    @property
    def cached(self):
        """Entries that a cache keeps of a token, in each layer."""
        return 2 * self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Family:
    """name: `model_type` of config.json.  defaults: of `DecoderConfig` fields left None.
    read: config.json -> fields.  write: DecoderConfig -> config.json.  tensors: DecoderConfig -> table.
    Both `read` and `write` raise ValueError for what the other side cannot express.
    attention: DecoderConfig -> AttentionShape.  mlp: `(DecoderConfig, **linen's own arguments)`, and `lora` where the
    model has one -> the module that takes [B,T,D] in the compute dtype and gives float32 [B,T,D]."""

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[dict], dict]
    write: Callable[[Any], dict]
    tensors: Callable[[Any], list[Tensor]]
    attention: Callable[[Any], AttentionShape]
    mlp: Callable[..., nn.Module]

    @property
    def classifier(self):
        """The architecture of the same body with a head of scores in place of the language model's."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")
