"""What the tests against Transformers share: one shape, and random models of it."""

import pytest

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)


def rotary(config):
    """`rope_parameters` of a Transformers config, whose version 4 has them in two fields."""
    if hasattr(config, "rope_parameters"):
        return config.rope_parameters
    return {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}


@pytest.fixture(scope="session")
def random_model():
    """random_model(auto class, model type, setting=..., ...) -> Transformers' model of SHAPE with these settings,
    in float32, every parameter away from its usual start."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    older = int(transformers.__version__.partition(".")[0]) < 5

    def make(auto_class, model_type, **settings):
        if older and "rope_parameters" in settings:
            rope = dict(settings.pop("rope_parameters"))
            settings["rope_theta"] = rope.pop("rope_theta")
            settings["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        config = transformers.AutoConfig.for_model(model_type, **SHAPE | settings)
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                scale = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.2
                weight.normal_(std=scale).add_(1.0 if "norm" in name else 0.0)
        return model

    make.shape, make.rotary, make.older = SHAPE, rotary, older
    return make
