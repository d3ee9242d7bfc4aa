"""Build whole models before and after fastlm is put into them: a row of the table for each.

To add a model, write how it is built, what a step of it is and how fastlm gets in, and add a row. Weights are random: nothing
is downloaded, and time does not depend on them. What a model needs that is not installed makes a row that says so.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from suite.rows import Step
from torch import Tensor, nn

import fastlm
from workloads import serving, spelled_out
from workloads.model_peers import compiled_by_zentorch, read_by_llama_cpp
from workloads.text_vae import lengths_of, noiseless_gradients, on_kernels, text_generation, text_gradients, text_vae
from workloads.timm_alone import import_timm

DTYPES = "float32", "bfloat16"
VOCABULARY = 30522
NEW_TOKENS = 8


@dataclass(frozen=True)
class Model:
    """A model at one size. Those of one name make a section."""

    name: str
    workload: str  # the size, as a reader sees it
    unit: str  # "tokens/s" or "images/s"
    items: int  # tokens or images of a step
    build: Callable[[], nn.Module]
    ready: Callable[[nn.Module], Step]  # makes the inputs, and returns the step that is timed
    put_in: dict[str, "Way"]  # how fastlm gets in
    peers: dict[str, "Way"] = field(default_factory=dict)  # how others do
    checked: Callable[[nn.Module], Step] | None = None  # as ``ready``, but small, without noise and with fixed weights
    memory: bool = False  # whether attention or the latent weighs in its peak memory, which takes two processes to measure
    quick: tuple[str, ...] = DTYPES[:1]  # the dtypes of `make bench`; the long run has all
    deferred: bool = False  # whether attention is found only where no mode of torch watches


# ---- how fastlm gets in -----------------------------------------------------------------------------------------------------


Entry = Callable[[], AbstractContextManager]  # Each step is run inside it.
Way = Callable[[nn.Module], Entry]


def replaced(model: nn.Module) -> Entry:
    report = fastlm.replace(model)
    if not report.swapped:
        raise RuntimeError(f"fastlm.replace swapped nothing: {report}")
    return nullcontext


def replaced_of(model: nn.Module, integration: str) -> Entry:
    importlib.import_module(f"fastlm.integrations.{integration}")
    return replaced(model)


def replaced_and_used(model: nn.Module, replace: Callable[[nn.Module], object] = fastlm.replace) -> Entry:
    replace(model)
    return fastlm.use


IN_TRANSFORMERS = {"replace": partial(replaced_of, integration="transformers")}
ZENTORCH = {"zentorch": compiled_by_zentorch}


def replaced_with_own_normal(model: nn.Module) -> Entry:
    model.normal = importlib.import_module("fastlm.integrations.distributions").Normal
    fastlm.replace(model)
    return nullcontext


# ---- models -----------------------------------------------------------------------------------------------------------------


def torch_encoder() -> nn.Module:
    """Build nn.TransformerEncoder of BERT-base's size."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 12).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=VOCABULARY), add_pooling_layer=False).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_positions=8192)).eval()


def qwen2() -> nn.Module:
    """Build a quarter of Qwen2-0.5B: 6 of its 24 layers, and the whole vocabulary."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=6, tie_word_embeddings=True)).eval()


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
    tokens = mask.bool()  # What stands at padding means nothing.
    return torch.inference_mode()(lambda: (model(input_ids=ids, attention_mask=mask).last_hidden_state[tokens],))


def without_dropout(model: nn.Module) -> nn.Module:
    """Return the model after setting every dropout to 0, as a check needs no noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients_of(model: nn.Module, batch: int, length: int, padded: bool, optimize: bool = False) -> Step:
    """Run forward and backward, and with ``optimize`` a step of AdamW. Return the output and the first weights' gradient.

    No gradient stays on the model, so that its memory counts as the step's own.
    """
    model.train()
    ids = _tokens(batch, length)
    inputs = {"input_ids": ids} | ({"attention_mask": _padding(batch, length)} if padded else {})
    if padded:  # These weights make a loss that is not constant, and leave out what stands at padding.
        weights = _normals(model, batch, length, model.config.hidden_size) * inputs["attention_mask"].unsqueeze(-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if optimize else None

    def step() -> tuple[Tensor, ...]:
        outputs = model(**inputs) if padded else model(**inputs, labels=ids)
        loss = (outputs.last_hidden_state * weights).mean() if padded else outputs.loss
        loss.backward()
        if optimizer:
            optimizer.step()
        output = outputs.last_hidden_state[inputs["attention_mask"].bool()] if padded else outputs.logits
        results = output.detach(), next(model.parameters()).grad
        model.zero_grad(set_to_none=True)
        return results

    return step


def prompt(model: nn.Module, batch: int, length: int) -> Step:
    """Read a prompt: logits of its last token, as the first step of generation needs them."""
    ids = _tokens(batch, length)
    return torch.inference_mode()(lambda: (model(input_ids=ids, logits_to_keep=1).logits,))


class CachedReader:
    """Read tokens by a transformers model with a cache, as generation does.

    The model reads ``prompt`` (B, L) first. With ``random_cache`` the cache gets as many random keys and values instead, which
    takes no time.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, room: int, random_cache: bool):
        from transformers import DynamicCache

        config, (batch, length) = model.config, prompt.shape
        self.model, self.cache = model, DynamicCache(config=config)
        if random_cache:
            heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
            cached = _normals(model, batch, heads, length, config.hidden_size // config.num_attention_heads)
            for layer in range(config.num_hidden_layers):
                self.cache.update(cached, cached, layer)
        else:
            self(prompt)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, 1, V) of the last of ``tokens`` (B, L)."""
        return self.model(input_ids=tokens, cache=self.cache, use_cache=True, logits_to_keep=1).logits

    def forget(self, count: int) -> None:
        """Remove the last ``count`` tokens from the cache."""
        self.cache.crop(-count)


def decoding(model: nn.Module, batch: int, length: int, random_cache: bool = True) -> Step:
    """Read NEW_TOKENS tokens one by one, as generation does, after ``length`` others in a cache. Return the logits."""
    tokens = _tokens(batch, length + NEW_TOKENS)
    reader = getattr(model, "reader", CachedReader)(model, tokens[:, :length], NEW_TOKENS, random_cache)

    def step() -> tuple[Tensor, ...]:
        logits = [reader(token) for token in tokens[:, length:].split(1, dim=1)]
        reader.forget(NEW_TOKENS)
        return (torch.cat(logits, dim=1),)

    return step


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


def _decoding(name: str, build: Callable[[], nn.Module], batch: int, length: int, quick: tuple[str, ...] = ()) -> Model:
    return Model(
        name=name,
        workload=f"B{batch} after {length:,}",
        unit="tokens/s",
        items=batch * NEW_TOKENS,
        build=build,
        ready=lambda model: decoding(model, batch, length),
        put_in=IN_TRANSFORMERS,
        peers={"llama.cpp in float16": read_by_llama_cpp},  # zentorch 2.14.0.1's answers with a cache are wrong.
        checked=lambda model: decoding(model, batch, 64, random_cache=False),
        quick=quick,
    )


_GPT2, _QWEN2 = ("GPT-2, small, generation", gpt2), ("Qwen2-0.5B, 6 of 24 layers, generation", qwen2)
_FLOAT32 = DTYPES[:1]


def _spelled_out_gpt(length: int, quick: tuple[str, ...] = _FLOAT32, memory: bool = False) -> Model:
    return Model(
        name="GPT with attention spelled out, training",
        workload=f"B1 S{length}, dropout 0.1",
        unit="tokens/s",
        items=length,
        build=spelled_out.gpt,
        ready=lambda model: spelled_out.gradients_of(model, 1, length, 256, training=True),
        put_in={"use": spelled_out.used},
        checked=lambda model: spelled_out.gradients_of(model, 1, 128, 256),
        memory=memory,
        quick=quick,
        deferred=True,
    )


MODELS = (
    Model(
        name="TransformerEncoder of BERT-base's size, inference",
        workload="B2 S512",
        unit="tokens/s",
        items=2 * 512,
        build=torch_encoder,
        ready=lambda model: forward_of(model, 2, 512, 768),
        put_in={"replace": replaced},
        peers=ZENTORCH,
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
        peers=ZENTORCH,
        checked=lambda model: padded_forward(model, 2, 64),
    ),
    Model(
        name="BertModel, base, padded, training",
        workload="B2 S512, dropout 0.1",
        unit="tokens/s",
        items=2 * 512,
        build=bert,
        ready=lambda model: gradients_of(model, 2, 512, padded=True, optimize=True),
        put_in=IN_TRANSFORMERS,
        checked=lambda model: gradients_of(without_dropout(model), 2, 64, padded=True),
        memory=True,
    ),
    Model(
        name="GPT-2, small, training",
        workload="B1 S512, dropout 0.1",
        unit="tokens/s",
        items=512,
        build=gpt2,
        ready=lambda model: gradients_of(model, 1, 512, padded=False, optimize=True),
        put_in=IN_TRANSFORMERS,
        checked=lambda model: gradients_of(without_dropout(model), 1, 128, padded=False),
    ),
    Model(
        name="GPT-2, small, prompt",
        workload="B1 S128",
        unit="tokens/s",
        items=128,
        build=gpt2,
        ready=lambda model: prompt(model, 1, 128),
        put_in=IN_TRANSFORMERS,
        quick=DTYPES,
    ),
    _decoding(*_GPT2, 1, 64, DTYPES),
    _decoding(*_GPT2, 4, 1024, _FLOAT32),
    *(_decoding(*_GPT2, *size) for size in ((1, 1024), (1, 4096), (4, 64), (8, 64), (8, 1024))),
    _decoding(*_QWEN2, 4, 1024, _FLOAT32),
    _decoding(*_QWEN2, 1, 4096, ("bfloat16",)),
    *(_decoding(*_QWEN2, *size) for size in ((1, 64), (4, 64), (8, 64), (4, 4096))),
    *(Model(**serving.continuous_batching(requests), put_in=IN_TRANSFORMERS) for requests in (8, 32)),
    Model(
        name="TextVAE, small, training",
        workload="B8 S10-320",
        unit="tokens/s",
        items=sum(lengths_of(8, 320)),
        build=text_vae,
        ready=lambda model: text_gradients(model, 8, 320),
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
        put_in={"replace, use": partial(replaced_and_used, replace=partial(replaced_of, integration="diffusers"))},
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
        put_in={"replace, Normal": replaced_with_own_normal},
        checked=lambda model: vae_gradients(model, 512, "kl"),
    ),
    Model(
        name="Vision transformer, small, inference",
        workload="B8 224 x 224",
        unit="images/s",
        items=8,
        build=vision_transformer,
        ready=lambda model: forward_of(model, 8, 3, 224, 224),
        put_in={"replace, use": replaced_and_used},
        peers=ZENTORCH,
        checked=lambda model: forward_of(model, 1, 3, 224, 224),
    ),
    _spelled_out_gpt(512),
    _spelled_out_gpt(1024, memory=True),
    _spelled_out_gpt(2048, quick=(), memory=True),
    Model(
        name="Vision transformer, small, attention spelled out, inference",
        workload="B8 224 x 224",
        unit="images/s",
        items=8,
        build=lambda: spelled_out.timm_model("vit_small_patch16_224"),
        ready=lambda model: forward_of(model, 8, 3, 224, 224),
        put_in={"use": spelled_out.used},
        checked=lambda model: forward_of(model, 2, 3, 224, 224),
        deferred=True,
    ),
    Model(
        name="Swin, tiny, attention spelled out, forward and backward",  # whose windows of 49 tokens a block leaves to torch
        workload="B1 224 x 224",
        unit="images/s",
        items=1,
        build=lambda: spelled_out.timm_model("swin_tiny_patch4_window7_224"),
        ready=lambda model: spelled_out.gradients_of(model, 1, 3, 224, 224),
        put_in={"use": spelled_out.left},
        checked=lambda model: spelled_out.gradients_of(model, 1, 3, 224, 224),
        deferred=True,
    ),
    Model(
        name="MultiheadAttention, weights thrown away, inference",
        workload="B1 S1024 E512",
        unit="tokens/s",
        items=1024,
        build=lambda: nn.MultiheadAttention(512, 8, batch_first=True).eval(),
        ready=lambda model: spelled_out.with_weights(model, 1, 1024),
        put_in={"replace": replaced, "use": spelled_out.used},
        checked=lambda model: spelled_out.with_weights(model, 1, 1024),
        deferred=True,
    ),
)
