"""Models of real libraries whose attention is spelled out run on fastlm inside ``with fastlm.use():``, in training too."""

import pytest
import torch
from support.drop_in import assert_as_good_as_original
from torch import nn
from workloads.spelled_out import timm_model
from workloads.timm_alone import import_alone

import fastlm
from fastlm.testing import seeded_normal

pytestmark = pytest.mark.usefixtures("any_size")


def assert_found(model: nn.Module, calls: int, x: torch.Tensor) -> None:
    """Assert that so many calls of attention are found, and that outputs and gradients are as good as the model's own."""
    routed = []

    def call(module, inputs):
        return _output(module(inputs["x"]))

    def call_inside(module, inputs):
        with fastlm.use() as report:
            out = call(module, inputs)
        assert not report.left, str(report)
        routed.append(report.routed)
        return out

    for training in (False, True):
        for module in model.train(training).modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        # The same module is both, told apart by how it is called.
        assert_as_good_as_original(
            model, Plain(model), lambda m, i: (call if type(m) is Plain else call_inside)(m, i), {"x": x}
        )
    assert set(routed) == {calls}


class Plain(nn.Module):
    """A model as it is; its parameters keep their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(model.__dict__)
        self.__dict__["inside"] = model

    def forward(self, *args, **options):
        return self.inside(*args, **options)


def _output(result):
    for name in ("last_hidden_state", "logits"):
        if hasattr(result, name):
            return getattr(result, name)
    return result


def installed(name: str):
    """Return a module, or skip the test."""
    try:
        return import_alone(name)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "calls", "options"),
    [
        ("vit_tiny_patch16_224", 2, {"img_size": 32, "depth": 2}),
        ("swin_tiny_patch4_window7_224", 4, {"img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}),
        ("beit_base_patch16_224", 2, {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}),
    ],
)
def test_timm(name, calls, options):
    torch.manual_seed(0)
    model = timm_model(name, num_classes=5, drop_path_rate=0.0, **options)
    side = options["img_size"]
    assert_found(model, calls, seeded_normal(1, (2, 3, side, side), torch.float32))


@pytest.mark.parametrize("name", ["Bert", "GPT2", "ViT", "Bloom"])
def test_transformers_eager(name):
    import transformers

    layers = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    sizes = {
        "Bert": {**layers, "vocab_size": 32},
        "GPT2": {"vocab_size": 32, "n_embd": 24, "n_layer": 2, "n_head": 3},
        "ViT": {**layers, "image_size": 32, "patch_size": 8},
        "Bloom": {"vocab_size": 32, "hidden_size": 24, "n_layer": 2, "n_head": 3},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes[name], attn_implementation="eager")
    model = getattr(transformers, f"{name}Model")(config)
    x = seeded_normal(1, (2, 3, 32, 32), torch.float32) if name == "ViT" else torch.arange(14).view(2, 7)
    assert_found(model, 2, x)


def test_vit_pytorch():
    vit = installed("vit_pytorch.vit")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "heads": 3, "mlp_dim": 32}
    assert_found(vit.ViT(**sizes), 2, seeded_normal(1, (2, 3, 16, 16), torch.float32))


@pytest.mark.parametrize("option", ["", "alibi_pos_bias", "rel_pos_bias", "rotary_pos_emb"])
def test_x_transformers(option):
    library = installed("x_transformers")
    torch.manual_seed(0)
    layers = library.Decoder(dim=32, depth=2, heads=2, attn_dim_head=32, **({option: True} if option else {}))
    model = library.TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=layers)
    assert_found(model, 2, torch.arange(14).view(2, 7))
