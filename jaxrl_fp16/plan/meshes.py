"""Which meshes of a number of chips are worth a look."""

LOOKED_AT = 6


def meshes_for(chips, near, own, rows, heads):
    """At most LOOKED_AT of `(data, fsdp, tensor)` with that many chips, `own` first.

    near: chips that reach one another without a network; a tensor axis stays among them.  rows: that data x fsdp must
    divide, of a minibatch and of a step's prompts.  heads: of keys and values, which a tensor axis should divide.
    """
    tensors = [size for size in (1, 2, 4, 8) if chips % size == 0 and size <= near and heads % size == 0]
    wanted = [(1, chips // tensor, tensor) for tensor in tensors]
    if chips > near:
        wanted.insert(1, (chips // near, near, 1))
    wanted += [(2, chips // 2, 1)] if chips % 2 == 0 else []
    divides = lambda mesh: all(count % (mesh[0] * mesh[1]) == 0 for count in rows)
    fitting = [mesh for mesh in dict.fromkeys(wanted) if mesh != own and divides(mesh)]
    return [own, *fitting][:LOOKED_AT]


def microbatch_for(mesh, own, minibatch):
    """Rows at once on a mesh: as near to `own` as data x fsdp and the minibatch allow."""
    parts = mesh[0] * mesh[1]
    sizes = [size for size in range(parts, minibatch + 1, parts) if minibatch % size == 0]
    return min(sizes, key=lambda size: (abs(size - own), size))
