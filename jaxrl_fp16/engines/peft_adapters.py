"""Adapters beside a Transformers model, by PEFT: `child.py` loads this file by its path, for a model that has them.

Like that file it imports nothing of jaxrl_fp16. Nothing is merged: a layer computes `x W + (x A) B scale`.
"""

import os

WEIGHTS = "adapter_model.safetensors"


def version():
    """PEFT's. Raises ImportError where it is not there."""
    import peft

    return peft.__version__


def put(model, folder, name):
    """`model` with the adapters of a folder in PEFT's format, called `name`, and no others; a `PeftModel` from the
    first ones on. They have its weights' dtype and device. Raises ValueError where they are not what the folder has."""
    import peft

    options = dict(adapter_name=name, autocast_adapter_dtype=False, torch_device=str(model.device))
    if not isinstance(model, peft.PeftModel):
        model = peft.PeftModel.from_pretrained(model, folder, local_files_only=True, **options)
    else:
        before = list(model.peft_config)
        model.load_adapter(folder, local_files_only=True, **options)
        model.set_adapter(name)
        for other in before:
            model.delete_adapter(other)
    _check(model, folder, name)
    return model.eval()


def _check(model, folder, name):
    """PEFT says in a warning alone what it did not find, and leaves it as it was drawn."""
    import peft
    from safetensors import safe_open

    found = peft.get_peft_model_state_dict(model, adapter_name=name)
    with safe_open(os.path.join(folder, WEIGHTS), "pt", device=str(model.device)) as stored:
        odd = found.keys() ^ set(stored.keys())
        odd = odd or {key for key, value in found.items() if not stored.get_tensor(key).to(value).equal(value)}
    if odd or list(model.active_adapters) != [name]:
        raise ValueError(f"PEFT {version()} did not take the adapters of {folder} whole, beginning with "
                         f"{min(odd, default=model.active_adapters)}")
