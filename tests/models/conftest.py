"""What the tests against Transformers share: one shape, and random models of it."""

import pytest

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)


@pytest.fixture(scope="session")
def random_model():
    """random_model(auto class, model type, setting=..., ...) -> Transformers' model of SHAPE with these settings,
    in float32, every parameter away from its usual start."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(auto_class, model_type, **settings):
        config = transformers.AutoConfig.for_model(model_type, **SHAPE | settings)
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                scale = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.2
                weight.normal_(std=scale).add_(1.0 if "norm" in name else 0.0)
        return model

    make.shape = SHAPE
    return make
