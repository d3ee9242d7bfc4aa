"""Build whole models before and after fastlm is put into them: a row of the table for each.

To add a model, write how it is built, what a step of it is and how fastlm gets in, and add a row. Weights are random: nothing
is downloaded, and time does not depend on them. What a model needs that is not installed makes a row that says so.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from suite.rows import Step
from torch import Tensor, nn

import fastlm
from workloads.text_vae import noiseless_gradients, on_kernels, text_generation, text_gradients, text_vae
from workloads.timm_alone import import_timm

VOCABULARY = 30522
NEW_TOKENS = 16


@dataclass(frozen=True)
class Model:
    """A model at one size."""

    name: str
    workload: str  # the size, as a reader sees it
    unit: str  # "tokens/s" or "images/s"
    items: int  # tokens or images of a step
    build: Callable[[], nn.Module]
    ready: Callable[[nn.Module], Step]  # makes the inputs, and returns the step that is timed
    put_in: dict[str, Callable[[nn.Module], Callable[[], AbstractContextManager]]]  # ways for fastlm to get in, below
    checked: Callable[[nn.Module], Step] | None = None  # as ``ready``, but small, without noise and with fixed weights
    memory: bool = False  # whether attention or the latent weighs in its peak memory, which takes two processes to measure


# ---- how fastlm gets in -----------------------------------------------------------------------------------------------------


Entry = Callable[[], AbstractContextManager]  # Each step is run inside it.


def replaced(model: nn.Module) -> Entry:
    report = fastlm.replace(model)
    if not report.swapped:
        raise RuntimeError(f"fastlm.replace swapped nothing: {report}")
    return nullcontext


def used(model: nn.Module) -> Entry:
    return fastlm.use


def replaced_and_used(model: nn.Module, integration: str) -> Entry:
    replaced_of(model, integration)
    return fastlm.use


def replaced_of(model: nn.Module, integration: str) -> Entry:
    importlib.import_module(f"fastlm.integrations.{integration}")
    return replaced(model)


IN_TRANSFORMERS = {"replace": partial(replaced_of, integration="transformers")}


def own_normal(model: nn.Module) -> Entry:
    model.normal = importlib.import_module("fastlm.integrations.distributions").Normal
    return nullcontext


# ---- models -----------------------------------------------------------------------------------------------------------------


def torch_encoder() -> nn.Module:
    """Build nn.TransformerEncoder of BERT-base's size."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 12).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    channels = (64, 128)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=channels, latent_channels=4, norm_num_groups=32, **blocks).eval()


def vision_transformer() -> nn.Module:
    return import_timm().create_model("vit_small_patch16_224", pretrained=False).eval()


class DistributionsVAE(nn.Module):
    """A VAE as its users write one with torch.distributions, on flat images of 784 numbers."""

    normal = torch.distributions.Normal

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 2 * 128))
        self.decoder = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 784))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions (B, 784) of x (B, 784), and the KL, 0-d."""
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        posterior = self.normal(mu, torch.exp(0.5 * logvar))
        kl = torch.distributions.kl_divergence(posterior, self.normal(torch.zeros_like(mu), torch.ones_like(mu)))
        return self.decoder(posterior.rsample()), kl.sum(-1).mean()


def pythae_vae() -> nn.Module:
    from pythae.models import VAE, VAEConfig

    return VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=128))


# ---- steps ------------------------------------------------------------------------------------------------------------------


def _normals(model: nn.Module, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def _padding(batch: int, length: int) -> Tensor:
    """Return a mask (B, L), 1 where there is a token. As in a batch of texts, lengths are a quarter of the longest and up."""
    lengths = torch.linspace(length / 4, length, batch).long()
    return (torch.arange(length) < lengths[:, None]).long()


def forward_of(model: nn.Module, *shape: int) -> Step:
    x = _normals(model, *shape)
    return torch.inference_mode()(lambda: (model(x),))


def padded_encoder(model: nn.Module, batch: int, length: int) -> Step:
    x, padding = _normals(model, batch, length, 768), _padding(batch, length) == 0
    return torch.inference_mode()(lambda: (model(x, src_key_padding_mask=padding),))


def padded_forward(model: nn.Module, batch: int, length: int) -> Step:
    ids, mask = _tokens(batch, length), _padding(batch, length)
    return torch.inference_mode()(lambda: (model(input_ids=ids, attention_mask=mask).last_hidden_state,))


def gradients_of(model: nn.Module, batch: int, length: int, padded: bool, optimize: bool = False) -> Step:
    """Run forward and backward, and with ``optimize`` a step of AdamW. Return the output and the first weights' gradient.

    No gradient stays on the model, so that its memory counts as the step's own.
    """
    model.train()
    ids = _tokens(batch, length)
    inputs = {"input_ids": ids} | ({"attention_mask": _padding(batch, length)} if padded else {})
    # The weights make a loss that is not constant.
    weights = _normals(model, batch, length, model.config.hidden_size) if padded else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if optimize else None

    def step() -> tuple[Tensor, ...]:
        outputs = model(**inputs) if padded else model(**inputs, labels=ids)
        loss = (outputs.last_hidden_state * weights).mean() if padded else outputs.loss
        loss.backward()
        if optimizer:
            optimizer.step()
        results = outputs[0 if padded else 1].detach(), next(model.parameters()).grad
        model.zero_grad(set_to_none=True)
        return results

    return step


def generation(model: nn.Module, batch: int, length: int) -> Step:
    """Generate NEW_TOKENS greedy tokens with a cache. Return the logits that each was chosen by."""
    ids = _tokens(batch, length)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_logits": True}
    return lambda: (torch.stack(model.generate(ids, **options).logits),)


def encoding(model: nn.Module, batch: int, side: int, sample: bool = True) -> Step:
    """Encode images to latents: draws from the posterior, or its mean."""
    x = _normals(model, batch, 3, side, side)
    draw = (lambda posterior: posterior.sample()) if sample else (lambda posterior: posterior.mode())
    return torch.inference_mode()(lambda: (draw(model.encode(x).latent_dist),))


def vae_gradients(model: nn.Module, batch: int, part: str = "loss") -> Step:
    """Run forward and backward of a VAE's "loss", or of its "kl", which has no noise, on images of 28 x 28."""
    x = _normals(model, batch, 784).sigmoid()

    def losses() -> dict[str, Tensor]:
        if isinstance(model, DistributionsVAE):
            reconstruction, kl = model(x)
            return {"loss": (reconstruction - x).square().sum(-1).mean() + kl, "kl": kl}
        outputs = model({"data": x.view(batch, 1, 28, 28)})
        return {"loss": outputs.loss, "kl": outputs.reg_loss}

    def step() -> tuple[Tensor, ...]:
        chosen = losses()[part]
        chosen.backward()
        results = chosen.detach(), next(p.grad for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
        return results

    return step


MODELS = (
    Model(
        name="TransformerEncoder of BERT-base's size, inference",
        workload="B2 S512",
        unit="tokens/s",
        items=2 * 512,
        build=torch_encoder,
        ready=lambda model: forward_of(model, 2, 512, 768),
        put_in={"replace": replaced},
        checked=lambda model: forward_of(model, 1, 128, 768),
    ),
    Model(
        name="TransformerEncoder of BERT-base's size, padded, inference",
        workload="B4 S256",
        unit="tokens/s",
        items=4 * 256,
        build=torch_encoder,
        ready=lambda model: padded_encoder(model, 4, 256),
        put_in={"replace": replaced},
        checked=lambda model: padded_encoder(model, 2, 64),
    ),
    Model(
        name="BertModel, base, padded, inference",
        workload="B4 S256",
        unit="tokens/s",
        items=4 * 256,
        build=bert,
        ready=lambda model: padded_forward(model, 4, 256),
        put_in=IN_TRANSFORMERS,
        checked=lambda model: padded_forward(model, 2, 64),
    ),
    Model(
        name="BertModel, base, padded, training",
        workload="B2 S256",
        unit="tokens/s",
        items=2 * 256,
        build=bert,
        ready=lambda model: gradients_of(model, 2, 256, padded=True, optimize=True),
        put_in=IN_TRANSFORMERS,
        checked=lambda model: gradients_of(model, 2, 64, padded=True),
        memory=True,
    ),
    Model(
        name="GPT-2, small, training",
        workload="B1 S512",
        unit="tokens/s",
        items=512,
        build=gpt2,
        ready=lambda model: gradients_of(model, 1, 512, padded=False, optimize=True),
        put_in=IN_TRANSFORMERS,
        checked=lambda model: gradients_of(model, 1, 128, padded=False),
    ),
    Model(
        name="GPT-2, small, generation",
        workload=f"B4, {NEW_TOKENS} after 256",
        unit="tokens/s",
        items=4 * NEW_TOKENS,
        build=gpt2,
        ready=lambda model: generation(model, 4, 256),
        put_in=IN_TRANSFORMERS,
        checked=lambda model: generation(model, 1, 64),
    ),
    Model(
        name="TextVAE, small, training",
        workload="B32 S72",
        unit="tokens/s",
        items=32 * 72,
        build=text_vae,
        ready=lambda model: text_gradients(model, 32, 72),
        put_in={"kernels": on_kernels},
        checked=lambda model: noiseless_gradients(model, 4, 72),
        memory=True,
    ),
    Model(
        name="TextVAE, small, generation",
        workload="B8, 64 from z",
        unit="tokens/s",
        items=8 * 64,
        build=text_vae,
        ready=lambda model: text_generation(model, 8, 64),
        put_in={"kernels": on_kernels},
        checked=lambda model: text_generation(model, 2, 16),
    ),
    Model(
        name="AutoencoderKL, encoding and sampling",
        workload="B4 128 x 128",
        unit="images/s",
        items=4,
        build=autoencoder,
        ready=lambda model: encoding(model, 4, 128),
        put_in={"replace, use": partial(replaced_and_used, integration="diffusers")},
        checked=lambda model: encoding(model, 1, 64, sample=False),
        memory=True,
    ),
    Model(
        name="pythae's VAE, forward and backward",
        workload="B512 latent 128",
        unit="images/s",
        items=512,
        build=pythae_vae,
        ready=lambda model: vae_gradients(model, 512),
        put_in={"replace": partial(replaced_of, integration="pythae")},
        checked=lambda model: vae_gradients(model, 512, "kl"),
    ),
    Model(
        name="VAE of torch.distributions, forward and backward",
        workload="B512 latent 128",
        unit="images/s",
        items=512,
        build=DistributionsVAE,
        ready=lambda model: vae_gradients(model, 512),
        put_in={"Normal": own_normal},
        checked=lambda model: vae_gradients(model, 512, "kl"),
    ),
    Model(
        name="Vision transformer, small, inference",
        workload="B8 224 x 224",
        unit="images/s",
        items=8,
        build=vision_transformer,
        ready=lambda model: forward_of(model, 8, 3, 224, 224),
        put_in={"use": used},
        checked=lambda model: forward_of(model, 1, 3, 224, 224),
    ),
)
