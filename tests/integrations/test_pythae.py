"""pythae's VAEs after fastlm.replace: losses and gradients on the same noise; saved, loaded, copied and restored."""

import copy
import math
import pickle

import pytest
import torch
from pythae import models
from pythae.data.datasets import DatasetOutput
from pythae.models import AutoModel
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseEncoder
from support.libraries import Ops, assert_held, off_by_an_ulp
from support.wrapped_tensor import Wrapped

import fastlm
from fastlm.integrations import pythae as integration
from fastlm.ops.noise import normal
from fastlm.testing import seeded_normal

SHAPE = (1, 16, 16)
KINDS = {"VAE": {}, "BetaVAE": {"beta": 3.0}, "MSSSIM_VAE": {"beta": 0.1}}
OTHERS = ("IWAE", "MIWAE", "PIWAE", "CIWAE", "VAMP", "VAE_IAF", "VAE_LinNF", "INFOVAE_MMD", "BetaTCVAE", "DisentangledBetaVAE")
OTHERS += ("FactorVAE", "Adversarial_AE", "VAEGAN", "SVAE", "PoincareVAE", "HVAE", "RHVAE")
EACH = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def kernel(widest_isa, monkeypatch):
    """Require the C++ kernel. On some machines these models' linear layers would be swapped, too, which others test."""
    monkeypatch.setattr("fastlm.nn.linear.gains", lambda weight: False)


def made(kind, **options):
    """Build the model of this kind, with the same weights each time."""
    config = getattr(models, f"{kind}_Config" if hasattr(models, f"{kind}_Config") else f"{kind}Config")
    torch.manual_seed(1)
    return getattr(models, kind)(config(input_dim=SHAPE, latent_dim=4, **options))


def batch(dtype=torch.float32):
    return DatasetOutput(data=seeded_normal(1, (6, *SHAPE), torch.float32).sigmoid().to(dtype))


def step(model, inputs):
    """Return the losses, the latent, the reconstruction, and the gradients of all parameters."""
    output = model(inputs)
    model.zero_grad()
    output.loss.backward()
    grads = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
    return {**{name: value.detach() for name, value in output.items()}, **grads}


# ---- values and gradients ---------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_a_step_and_its_gradients_are_pythae_s_on_the_same_noise(kind, training, loss, monkeypatch):
    model = made(kind, **KINDS[kind], reconstruction_loss=loss).train(training)
    plain_class = type(model)
    assert list(fastlm.replace(model).swapped) == [""]
    torch.manual_seed(7)
    with Ops() as ops:
        actual = step(model, batch())
    assert ops.fastlm == ["reparameterize", "reparameterize_backward"]
    assert fastlm.restore(model).swapped and type(model) is plain_class
    torch.manual_seed(7)
    noise = normal(actual["z"].shape, seed=torch.randint(2**63 - 1, ()))
    monkeypatch.setattr(plain_class, "_sample_gauss", lambda self, mu, std: (mu + noise.to(std.dtype) * std, noise))
    plain = step(model, batch())
    x = batch().data
    golden = step(in_float64(model), DatasetOutput(data=x.double()))
    noise = off_by_an_ulp(noise, 2)
    assert_held(actual, plain, golden, step(model, DatasetOutput(data=off_by_an_ulp(x, 3))))


def in_float64(model):
    """Convert a model to float64, with the window of pythae's msssim, which pythae makes in float32."""
    if hasattr(model, "msssim"):
        make_window = model.msssim._create_window
        model.msssim._create_window = lambda **options: make_window(**options).double()
    return model.double()


def test_beta_is_read_when_it_is_used():
    model = made("BetaVAE", beta=2.0)
    fastlm.replace(model)
    for beta in (2.0, 5.0):
        model.beta = beta
        output = model(batch())
        torch.testing.assert_close(output.loss, output.recon_loss + beta * output.reg_loss)


def test_a_beta_on_a_plain_vae_weighs_nothing_as_with_pythae():
    model = made("VAE")
    model.beta = 5.0
    fastlm.replace(model)
    output = model(batch())
    torch.testing.assert_close(output.loss, output.recon_loss + output.reg_loss)


def test_the_kl_is_the_latent_s():
    model = made("VAE")
    fastlm.replace(model)
    encoded = model.encoder(batch().data)
    kl = fastlm.gaussian_kl(encoded.embedding, encoded.log_covariance)
    torch.testing.assert_close(model(batch()).reg_loss, kl.mean())


def test_what_goes_by_forward_is_drawn_by_the_kernel():
    model = made("VAE").eval()
    fastlm.replace(model)
    x = batch().data
    with torch.no_grad(), Ops() as ops:
        assert model.reconstruct(x).shape == x.shape
        assert model.embed(x).shape == (6, 4)
        assert model.predict(x).keys() == {"recon_x", "embedding"}  # uses the mean
    assert ops.fastlm == ["reparameterize"] * 2
    assert math.isfinite(model.get_nll(x[:2], n_samples=4, batch_size=4))  # runs pythae's own code


def test_manual_seed_repeats_it():
    model = made("VAE")
    fastlm.replace(model)
    zs = []
    for _ in range(2):
        torch.manual_seed(2)
        zs.append(model(batch()).z)
    assert torch.equal(*zs) and not torch.equal(model(batch()).z, zs[0])


def test_the_noise_is_standard_normal():
    """Mean and variance are within five standard errors of 0 and 1."""
    model = made("VAE")
    fastlm.replace(model)
    x = batch().data[:1].expand(62_500, *SHAPE)  # 4 draws per row
    torch.manual_seed(3)
    with torch.no_grad():
        encoded = model.encoder(x[:1])
        z = model(DatasetOutput(data=x)).z
    eps = ((z - encoded.embedding) / torch.exp(0.5 * encoded.log_covariance)).double().flatten()
    assert abs(eps.mean()) < 5 / math.sqrt(len(eps))
    assert abs((eps**2).mean() - 1) < 5 * math.sqrt(2 / len(eps))


def test_training_learns_two_flat_images():
    model = made("BetaVAE", beta=0.1)
    fastlm.replace(model)
    x = torch.tensor([0.1, 0.9]).repeat(8)[:, None, None, None].expand(16, *SHAPE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    torch.manual_seed(1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(DatasetOutput(data=x)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# ---- the swap ---------------------------------------------------------------------------------------------------------------


@EACH
def test_replace_and_restore_change_the_class_and_nothing_else(kind):
    model = made(kind)
    cls, parameters = type(model), [p.data_ptr() for p in model.parameters()]
    assert fastlm.replace(model).swapped == {"": f"{kind} -> Fused{kind}"}
    assert not fastlm.replace(model).swapped and not fastlm.replace(model).left
    assert isinstance(model, cls) and [p.data_ptr() for p in model.parameters()] == parameters
    assert fastlm.restore(model).swapped == {"": f"Fused{kind} -> {kind}"}
    assert type(model) is cls and not fastlm.restore(model).swapped
    with Ops() as ops:
        model(batch())
    assert not ops.fastlm


@pytest.mark.parametrize("kind", OTHERS)
def test_relatives_with_a_latent_of_their_own_are_left_and_told(kind):
    cls = getattr(models, kind)
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    report = fastlm.replace(model)
    assert not report.swapped and type(model) is cls
    assert report.left == {"": f"{kind} samples or weighs its latent in a way of its own"}


def test_every_model_of_pythae_with_a_vae_among_its_bases_is_swapped_or_known_to_be_left():
    vaes = {name for name, cls in vars(models).items() if isinstance(cls, type) and issubclass(cls, models.VAE)}
    assert vaes == {*KINDS, *OTHERS}
    assert {cls.__name__ for cls in integration._FUSED} == set(KINDS)


def test_a_subclass_of_the_user_s_is_left():
    class Mine(models.VAE):
        pass

    model = Mine(models.VAEConfig(input_dim=SHAPE, latent_dim=4))
    assert "Mine samples" in fastlm.replace(model).left[""] and type(model) is Mine


@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_swapped_model_is_swapped_and_can_be_restored(kind, copied):
    model = made(kind)
    cls = type(model)
    fastlm.replace(model)
    other = copied(model)
    outputs = []
    for one in (model, other):
        torch.manual_seed(4)
        outputs.append(one(batch()).loss)
    assert torch.equal(*outputs)
    fastlm.restore(other)
    assert type(other) is cls and type(model) is not cls


@EACH
def test_what_a_swapped_model_saves_pythae_loads_and_the_other_way(kind, tmp_path):
    model = made(kind, **KINDS[kind])
    cls = type(model)
    model.save(str(tmp_path / "plain"))
    fastlm.replace(model)
    model.save(str(tmp_path / "swapped"))
    loaded = [AutoModel.load_from_folder(str(tmp_path / name)) for name in ("plain", "swapped")]
    assert [type(one) for one in loaded] == [cls, cls]
    loaded.append(type(model).load_from_folder(str(tmp_path / "plain")))  # load by the swapped class itself
    for one in loaded[:2]:
        fastlm.replace(one)
    outputs = []
    for one in (model, *loaded):
        torch.manual_seed(4)
        outputs.append(one(batch()).loss)
    assert all(torch.equal(out, outputs[0]) for out in outputs)


class Encoder(BaseEncoder):
    """An encoder with one linear layer, whose halves are views of one tensor."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(math.prod(SHAPE), 8)

    def forward(self, x):
        mu, logvar = self.linear(x.flatten(1)).chunk(2, dim=1)
        return ModelOutput(embedding=mu, log_covariance=logvar)


def test_an_encoder_of_the_user_s_may_give_views():
    model = models.VAE(models.VAEConfig(input_dim=SHAPE, latent_dim=4), encoder=Encoder())
    fastlm.replace(model)
    with Ops() as ops:
        model(batch()).loss.backward()
    assert ops.fastlm == ["reparameterize", "reparameterize_backward"] and model.encoder.linear.weight.grad.any()
    encoded = model.encoder(batch().data)
    torch.manual_seed(5)
    z = model(batch()).z
    torch.manual_seed(5)
    assert torch.equal(z, fastlm.reparameterize(encoded.embedding, encoded.log_covariance))


class Odd(Encoder):
    """Other encoders may give another dtype, one variance for all dimensions, or a subclass of Tensor."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        output = super().forward(x)
        return ModelOutput(embedding=output.embedding, log_covariance=self.change(output.log_covariance))


ODD = {
    "float64": torch.Tensor.double,
    "bfloat16": torch.Tensor.bfloat16,
    "one variance": lambda logvar: logvar.mean(dim=-1, keepdim=True),
    "a wrapper": lambda logvar: Wrapped(logvar.detach()),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("what", ODD)
def test_log_variances_that_pythae_takes(what, autocast):
    """fastlm promotes and broadcasts as pythae does; the KL is pythae's, and many samples have the mean mu."""
    model = made("VAE")
    model.encoder = Odd(ODD[what])
    if what == "float64":
        model.decoder.double()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and what != "float64"):
            results.append(model(batch()))
        fastlm.replace(model)
    theirs, mine = results
    assert type(model) is integration.FusedVAE
    assert mine.z.dtype == theirs.z.dtype and mine.z.shape == theirs.z.shape
    torch.testing.assert_close(mine.reg_loss, theirs.reg_loss, check_dtype=False, rtol=2e-2, atol=1e-3)
    if what in ("one variance", "a wrapper"):
        assert torch.equal(mine.z, theirs.z), "pythae's own noise"


def test_a_forward_on_the_instance_is_left():
    model = made("VAE")
    model.forward = lambda inputs: None
    report = fastlm.replace(model)
    assert not report.swapped and "forward was set on this module itself" in report.left[""]
