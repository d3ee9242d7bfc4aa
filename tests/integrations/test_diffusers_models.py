"""diffusers' autoencoders after fastlm.replace: tiny models, trained, evaluated, saved, loaded and restored."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderOobleck,
    AutoencoderTiny,
    ModelMixin,
)
from diffusers.models import autoencoders
from diffusers.models.autoencoders import vae as theirs
from support.libraries import Ops, assert_held, off_by_an_ulp

import fastlm
from fastlm.integrations.diffusers import DiagonalGaussianDistribution, _AutoencoderSwap
from fastlm.ops.noise import normal
from fastlm.testing import seeded_normal

SMALL = {"norm_num_groups": 4, "latent_channels": 4}
IMAGE, VIDEO = (2, 3, 16, 16), (2, 3, 5, 16, 16)
MODELS = {  # name: (constructor, input shape)
    "AutoencoderKL": (lambda: AutoencoderKL(block_out_channels=(8,), **SMALL), IMAGE),
    "AsymmetricAutoencoderKL": (
        lambda: AsymmetricAutoencoderKL(down_block_out_channels=(8,), up_block_out_channels=(8,), **SMALL),
        IMAGE,
    ),
    "AutoencoderKLCogVideoX": (lambda: AutoencoderKLCogVideoX(block_out_channels=(8,) * 4, layers_per_block=1, **SMALL), VIDEO),
    "AutoencoderKLWan": (lambda: AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1, dim_mult=[1, 1, 1, 1]), VIDEO),
}
EACH = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def kernel(widest_isa):
    """Require the C++ kernel."""


def made(name):
    """Build the model of this name, with the same weights each time, and an input."""
    make, shape = MODELS[name]
    torch.manual_seed(1)
    return make(), seeded_normal(1, shape, torch.float32)


def generator():
    return torch.Generator().manual_seed(5)


def step(model, x, generator=None):
    """Run a training step: return the latent, the reconstruction, the two losses, and all parameters' gradients."""
    posterior = model.encode(x).latent_dist
    latent = posterior.sample(generator=generator)
    out = model.decode(latent).sample
    kl = posterior.kl().flatten(1).sum(1) if posterior.kl().dim() > 1 else posterior.kl()  # diffusers does not sum a video's
    loss = (out**2).mean() + 0.1 * kl.mean()
    model.zero_grad()
    loss.backward()
    grads = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"latent": latent.detach(), "out": out.detach(), "kl": kl.detach(), "loss": loss.detach(), **grads}


@EACH
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_step_and_its_gradients_are_diffusers_on_the_same_noise(name, training, monkeypatch):
    model, x = made(name)
    model.train(training)
    report = fastlm.replace(model)
    assert list(report.swapped) == [""] and not report.left
    with Ops() as ops:
        actual = step(model, x, generator())
    assert ops.fastlm == ["reparameterize", "reparameterize_backward"]
    fastlm.restore(model)
    seed = torch.randint(2**63 - 1, (), generator=generator())
    eps = normal(actual["latent"].shape, seed=seed)
    noise = eps
    monkeypatch.setattr(theirs, "randn_tensor", lambda shape, dtype, **_: noise.to(dtype))
    plain = step(model, x)
    golden = step(model.double(), x.double())
    noise = off_by_an_ulp(eps, 2)
    assert_held(actual, plain, golden, step(model, off_by_an_ulp(x, 3)))


@EACH
def test_its_forward_draws_by_the_kernel_or_takes_the_mode(name):
    model, x = made(name)
    mode = model(x).sample
    fastlm.replace(model)
    with torch.no_grad(), Ops() as ops:
        torch.testing.assert_close(model(x).sample, mode)
        assert not ops.fastlm
        drawn = model(x, sample_posterior=True, generator=generator()).sample
    assert ops.fastlm == ["reparameterize"]
    assert torch.equal(drawn, model.decode(model.encode(x).latent_dist.sample(generator())).sample)


def test_slices_and_tuples_and_the_decoder_for_videos():
    model, x = made("AutoencoderKL")
    fastlm.replace(model)
    model.enable_slicing()
    (posterior,) = model.encode(x, return_dict=False)
    assert type(posterior) is DiagonalGaussianDistribution and len(posterior.sample()) == 2
    decoder = AutoencoderKLTemporalDecoder(block_out_channels=(32,), latent_channels=4)
    assert fastlm.replace(decoder).swapped
    assert type(decoder.encode(x).latent_dist) is DiagonalGaussianDistribution


def test_its_attention_runs_inside_use():
    model, x = made("AutoencoderKL")
    fastlm.replace(model)
    expected = model(x, sample_posterior=True, generator=generator()).sample
    with fastlm.use(), Ops() as ops:
        out = model(x, sample_posterior=True, generator=generator()).sample
    assert len([op for op in ops.fastlm if "attention" in op]) == 2 and "reparameterize" in ops.fastlm
    torch.testing.assert_close(out, expected)


def test_it_works_under_compile():
    model, x = made("AutoencoderKL")
    fastlm.replace(model)
    expected = model.encode(x).latent_dist

    def step(x):
        posterior = model.encode(x).latent_dist
        return posterior.sample(), posterior.kl()

    torch.manual_seed(2)
    z, kl = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    torch.manual_seed(2)
    torch.testing.assert_close(z, expected.sample())
    torch.testing.assert_close(kl, expected.kl())


@EACH
def test_replace_and_restore_change_the_class_and_nothing_else(name):
    model, x = made(name)
    before, state, cls = str(model), copy.deepcopy(model.state_dict()), type(model)
    parameters = [p.data_ptr() for p in model.parameters()]
    assert fastlm.replace(model).swapped[""] == f"{name} encodes to fastlm's DiagonalGaussianDistribution"
    assert not fastlm.replace(model).swapped and not fastlm.replace(model).left  # the second time there is nothing to do
    assert (type(model).__module__, type(model).__name__) == (cls.__module__, cls.__name__)  # what pipelines save
    assert isinstance(model, cls) and str(model) == before and [p.data_ptr() for p in model.parameters()] == parameters
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert fastlm.restore(model).swapped[""] == f"{name} encodes to diffusers' DiagonalGaussianDistribution"
    assert type(model) is cls and type(model.encode(x).latent_dist) is theirs.DiagonalGaussianDistribution
    assert not fastlm.restore(model).swapped


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_swapped_model_is_swapped_and_can_be_restored(copied):
    model, x = made("AutoencoderKL")
    fastlm.replace(model)
    other = copied(model)
    with torch.no_grad():
        assert torch.equal(model.encode(x).latent_dist.sample(generator()), other.encode(x).latent_dist.sample(generator()))
    assert type(other) is type(model)
    fastlm.restore(other)
    assert type(other) is AutoencoderKL and type(model) is not AutoencoderKL


def test_what_a_swapped_model_saves_diffusers_loads_and_the_other_way(tmp_path):
    model, x = made("AutoencoderKL")
    model.save_pretrained(tmp_path / "plain")
    fastlm.replace(model)
    model.save_pretrained(tmp_path / "swapped")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "swapped" / file).read_bytes()
    loaded = AutoencoderKL.from_pretrained(tmp_path / "swapped")
    assert type(loaded) is AutoencoderKL
    fastlm.replace(loaded)
    again = type(model).from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        latents = [m.eval().encode(x).latent_dist.sample(generator()) for m in (model, loaded, again)]
    assert all(torch.equal(latent, latents[0]) for latent in latents)


def test_it_is_found_inside_another_module():
    outer = torch.nn.ModuleDict({"vae": made("AutoencoderKL")[0], "head": torch.nn.Linear(2, 2)})
    assert list(fastlm.replace(outer).swapped) == ["vae"]
    assert list(fastlm.restore(outer).swapped) == ["vae"]


TINY = {
    "encoder_block_out_channels": (8,),
    "decoder_block_out_channels": (8,),
    "num_encoder_blocks": (1,),
    "num_decoder_blocks": (1,),
}
OOBLECK = {"encoder_hidden_size": 8, "downsampling_ratios": [2], "channel_multiples": [1], "decoder_channels": 8}


def test_what_has_another_posterior_is_left_and_told():
    for model in (AutoencoderTiny(**TINY), AutoencoderOobleck(**OOBLECK)):
        cls = type(model)
        report = fastlm.replace(model)
        assert report.left == {"": f"{cls.__name__} does not encode to diffusers' DiagonalGaussianDistribution"}
        assert not report.swapped and type(model) is cls


def test_an_encode_that_was_set_on_the_model_is_left_and_told():
    model, _ = made("AutoencoderKL")
    model.encode = torch.no_grad()(model.encode)
    assert "encode was set on this module itself" in fastlm.replace(model).left[""]
    assert type(model) is AutoencoderKL


def test_a_subclass_of_the_user_s_is_swapped_too():
    class Mine(AutoencoderKL):
        def encode(self, x, return_dict=True):
            return super().encode(2 * x, return_dict)

    x, model = made("AutoencoderKL")[1], Mine(block_out_channels=(8,), **SMALL)
    expected = model.encode(x).latent_dist.mean
    fastlm.replace(model)
    posterior = model.encode(x).latent_dist
    assert type(posterior) is DiagonalGaussianDistribution and torch.equal(posterior.mean, expected)


def test_every_autoencoder_of_diffusers_that_builds_this_posterior_is_known():
    """By their source, exactly the models that call the constructor are swapped."""
    classes = [cls for _, cls in inspect.getmembers(autoencoders, inspect.isclass) if issubclass(cls, ModelMixin)]
    assert len(classes) > 15
    source_of = functools.cache(inspect.getsource)  # Python parses a whole file for it, and the classes share their bases.
    for cls in classes:
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        sources = [source_of(base) for base in cls.__mro__ if "diffusers" in base.__module__]
        builds = any(" DiagonalGaussianDistribution(" in source for source in sources)
        assert (_AutoencoderSwap().why_not(module) is None) == builds, cls
