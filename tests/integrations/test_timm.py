"""A vision transformer of timm runs on fastlm inside ``with fastlm.use():``, in training and evaluation."""

import pytest
import torch
from support.drop_in import assert_as_good_as_original
from workloads.timm_alone import import_timm

import fastlm
from fastlm.testing import seeded_normal


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel, as these tests are about the fused path."""


def vision_transformer(dtype: torch.dtype) -> torch.nn.Module:
    """Build a model of three layers, width 24 and 3 heads, for images of 4 x 4 patches and 5 classes."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = import_timm().create_model("vit_tiny_patch16_224", pretrained=False, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


class OnFastlm(torch.nn.Module):
    """A model whose forward runs inside the block; its parameters keep their names."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__.update(model.__dict__)
        self.__dict__["inside"], self.__dict__["routed"] = model, 0

    def forward(self, x):
        with fastlm.use() as report:
            out = self.inside(x)
        self.__dict__["routed"] += report.routed
        assert not report.left
        return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, training):
    original = vision_transformer(dtype).train(training)
    ours = OnFastlm(original)
    images = seeded_normal(1, (2, 3, 16, 16), torch.float32)
    assert_as_good_as_original(ours, original, lambda model, inputs: model(inputs["images"]), {"images": images}, dtype)
    assert ours.routed == 3, "one call a layer"


def test_an_image_s_features_and_after_the_block():
    model = vision_transformer(torch.float32).eval()
    images = seeded_normal(1, (2, 3, 16, 16), torch.float32)
    with torch.inference_mode():
        before = model.forward_features(images)
        with fastlm.use() as report:
            inside = model.forward_features(images)
        assert report.routed == 3 and torch.equal(model.forward_features(images), before)
    torch.testing.assert_close(inside, before)
