"""Parameters of which a part is frozen: `{"base": frozen, "lora": trained}`.

base: what the plain model has, in the compute dtype alone: 2 bytes a parameter, without master, gradient or moments.
Of a Critic it is `{"body": that}`.  lora: the adapters, float32, nested as their kernels are, `a` and `b` for each; of
a Critic `{"body": those, "value": its head}`.
Every other tree is of a model whose parameters are all trained. Without "lora" the tree is the model before training.
"""

from jaxrl_fp16.models.lora import COLLECTION

BASE, LORA = "base", COLLECTION
DROPOUT = "dropout"     # beside the two in a gradient program: the key from which a step draws what adapters drop


def is_adapted(params):
    """Whether a part of these parameters is frozen."""
    return BASE in params or LORA in params


def trained_of(params):
    """The part that gradients are taken of."""
    return params[LORA] if is_adapted(params) else params


def with_trained(params, trained):
    """`params` with another part that gradients are taken of."""
    return {**params, LORA: trained} if is_adapted(params) else trained


def base_of(params):
    """The parameters of the plain model; all of them where none is frozen."""
    return params[BASE] if is_adapted(params) else params


def without_adapters(params):
    """What the model was before training: the frozen part alone, no copy."""
    return {BASE: params[BASE]}


def frozen_apart(params):
    """`(params without their frozen part, that part or None)`; `frozen_back` joins the two."""
    if BASE not in params:
        return params, None
    return {name: part for name, part in params.items() if name != BASE}, params[BASE]


def frozen_back(params, frozen):
    return params if frozen is None else {BASE: frozen, **params}


def in_one(params):
    """A Decoder's parameters as its programs hold them: those of the plain model, and the adapters as "lora"."""
    if not is_adapted(params):
        return params
    return {**params[BASE], **({LORA: params[LORA]} if LORA in params else {})}


def variables_of(compute):
    """Linen's variables of what `forward.cast_to_compute` gives, of a Decoder or Critic."""
    if "body" in compute:
        body = variables_of(compute["body"])
        adapters = {LORA: {"body": body[LORA]}} if LORA in body else {}
        return {"params": {"body": body["params"], "value": compute["value"]}, **adapters}
    plain = {name: leaf for name, leaf in compute.items() if name != LORA}
    return {"params": plain, **({LORA: compute[LORA]} if LORA in compute else {})}
