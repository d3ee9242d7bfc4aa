"""Test that torch's two ONNX exporters write torch's own ops, which ONNX Runtime runs, and that torch.export keeps fastlm's."""

import io

import onnxruntime
import pytest
import torch

import fastlm
from fastlm.testing import seeded_normal


@pytest.fixture(autouse=True)
def widest(widest_isa):
    torch.use_deterministic_algorithms(False)  # The exporters use ops that are not deterministic.


class Autoencoder(torch.nn.Module):
    """Imitate a user's VAE. Without samples it decodes the posterior's mean, so that outputs can be compared."""

    def __init__(self, samples: bool):
        super().__init__()
        self.latent, self.decoder, self.samples = fastlm.nn.GaussianLatent(6, 3, free_bits=0.01), torch.nn.Linear(3, 6), samples

    def forward(self, x):
        z, kl = self.latent(x)
        return self.decoder(z if self.samples else self.latent.mode(x)), kl


class Attention(torch.nn.Module):
    def forward(self, query, key, value, mask):
        out = fastlm.attention(query, key, value, mask=mask, causal=True, softcap=4.0)
        return out + fastlm.scaled_dot_product_attention(query, key, value), fastlm.attention(query, key, value, window=(2, 0))


def exported(module: torch.nn.Module, inputs: tuple, dynamo: bool, tmp_path):
    """Export the module, and return a session of ONNX Runtime for the result."""
    if not dynamo:
        file = io.BytesIO()
        torch.onnx.export(module, inputs, file, dynamo=False)
        return onnxruntime.InferenceSession(file.getvalue())
    torch.onnx.export(module, inputs, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    return onnxruntime.InferenceSession(tmp_path / "model.onnx")


def run(session, inputs: tuple) -> list[torch.Tensor]:
    outputs = session.run(
        None, {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), inputs, strict=True)}
    )
    return [torch.from_numpy(output) for output in outputs]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["by tracing", "by torch.export"])
def test_onnx_of_attention(dynamo, tmp_path):
    inputs = (*(seeded_normal(i, (1, 2, 5, 8), torch.float32) for i in range(3)), seeded_normal(3, (5, 5), torch.float32))
    session = exported(Attention(), inputs, dynamo, tmp_path)
    torch.testing.assert_close(run(session, inputs), list(Attention()(*inputs)), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["by tracing", "by torch.export"])
def test_onnx_of_a_vae(dynamo, tmp_path):
    inputs = (seeded_normal(1, (4, 6), torch.float32),)
    torch.manual_seed(0)
    module = Autoencoder(samples=False).eval()
    outputs = run(exported(module, inputs, dynamo, tmp_path), inputs)
    torch.testing.assert_close(outputs, [out.detach() for out in module(*inputs)], rtol=1e-5, atol=1e-6)
    module.samples = True
    session = exported(module, inputs, dynamo, tmp_path)
    first, second = run(session, inputs), run(session, inputs)
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])  # ONNX draws its own noise.


def test_torch_export_keeps_the_ops_of_fastlm():
    inputs = (seeded_normal(1, (4, 6), torch.float32),)
    program = torch.export.export(Autoencoder(samples=True).eval(), inputs)
    assert any("fastlm.reparameterize" in str(node.target) for node in program.graph.nodes)
