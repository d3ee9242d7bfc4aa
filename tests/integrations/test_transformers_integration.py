"""Swapping transformers' models and back, the calls that are left to them, and the masks that fastlm builds."""

import copy
import importlib
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers as hf
from support.processes import printed
from support.transformers_models import (
    ARCHITECTURES,
    BERT,
    LENGTH,
    LLAMA,
    TOKENS,
    Architecture,
    count_calls,
    inputs_of,
    valid_of,
)
from support.wrapped_tensor import Wrapped
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_sliding_window_causal_mask

import fastlm
from fastlm.integrations.transformers import attention as transformers_attention
from fastlm.integrations.transformers import mask as transformers_mask
from fastlm.testing import seeded_normal

BLOOM = Architecture(hf.BloomForCausalLM, {"hidden_size": 32, "n_layer": 2, "n_head": 4})
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 8, "patch_size": 4}


def close_to_eager(model: torch.nn.Module, inputs: dict, **options) -> None:
    """Assert equality in float32 to a few roundings, for what the exact comparisons of test_transformers.py lack."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    expected, actual = (run(**inputs, **options).logits for run in (eager, model))
    valid = valid_of(inputs) if "attention_mask" in inputs and inputs["attention_mask"].dim() == 2 else ...
    torch.testing.assert_close(actual[valid], expected[valid])


# ---- in and out -------------------------------------------------------------------------------------------------------------


def test_replace_and_restore(monkeypatch):
    """Swap in one line, and go back in one; keep the swap in a copy and a pickle, but not in a saved config."""
    model = ARCHITECTURES["Llama"].build("sdpa")
    report = fastlm.replace(model)
    assert report.swapped == {"": "attn_implementation 'sdpa' -> 'fastlm'; its caches grow in place"} and not report.left
    calls = count_calls(monkeypatch)
    model(**inputs_of(model))
    assert calls() == 2
    assert "fastlm" not in model.config.to_json_string()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not fastlm.replace(other).swapped
        assert fastlm.restore(other).swapped == {"": "attn_implementation 'fastlm' -> 'sdpa'; its caches are transformers' own"}
        assert other.config._attn_implementation == "sdpa" and not fastlm.restore(other).swapped


def implementations(model: torch.nn.Module) -> dict[str, str]:
    return {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}


def llava(implementation) -> hf.PreTrainedModel:
    """Build a model that contains a vision model and a language model."""
    text = {**LLAMA, **TOKENS, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 2}
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.GptOssConfig(**text))
    return hf.LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation)


@pytest.mark.parametrize("inner_first", [False, True])
def test_models_in_a_model(inner_first):
    """Each inner model has its own config, and gets back its earlier implementation."""
    model = llava({"vision_config": "sdpa", "text_config": "eager"})
    before = implementations(model)
    assert {"eager", "sdpa"} <= set(before.values())
    if inner_first:
        assert list(fastlm.replace(model.model.language_model).swapped) == [""]
    report = fastlm.replace(model)
    assert list(report.swapped) == [""] and not report.left
    assert set(implementations(model).values()) == {"fastlm"}
    fastlm.restore(model)
    assert implementations(model) == before


def test_restore_of_models_made_with_fastlm():
    """Each gets its own default of transformers: GPT-OSS and Gemma 2 have no sdpa."""
    model = llava("fastlm")
    fastlm.restore(model)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.model.language_model.config._attn_implementation == "eager"
    model = ARCHITECTURES["Gemma 2"].build("fastlm")
    assert fastlm.restore(model).swapped == {"": "attn_implementation 'fastlm' -> 'eager'"}
    close_to_eager(model, inputs_of(model))


def test_attention_beside_the_interface_is_left(monkeypatch):
    """replace() reports it. If the name is given, such a model gets eager's masks, which its attention reads itself."""
    report = fastlm.replace(BLOOM.build())
    assert report.left[""] == "BloomAttention does not go through transformers' AttentionInterface" and not report.swapped
    calls = count_calls(monkeypatch)
    asked, eager = BLOOM.build("fastlm"), BLOOM.build("eager")
    for padding in (None, "right", "left"):
        assert torch.equal(asked(**inputs_of(asked, padding)).logits, eager(**inputs_of(eager, padding)).logits)
    assert calls() == 0


class SwitchedAttention(torch.nn.Module):
    """An attention as models bring it that were written before transformers' interface."""

    def __init__(self, config):
        super().__init__()
        self.fused_attn = config.use_flash_attn

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x) if self.fused_attn else torch.softmax(x @ x.mT, -1) @ x


class SwitchedModel(hf.PreTrainedModel):
    config_class = hf.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.attention = SwitchedAttention(config)


def test_a_model_s_own_switch_is_told_of():
    config = hf.PreTrainedConfig(use_flash_attn=False, attn_config={"attn_impl": "torch", "attn_pdrop": 0.1}, flash_layers=[1])
    reason = fastlm.replace(SwitchedModel(config)).left[""]
    assert reason.startswith("SwitchedAttention does not go through transformers' AttentionInterface; ")
    for switch in (
        "config.use_flash_attn=False",
        "config.attn_config['attn_impl']='torch'",
        "SwitchedAttention.fused_attn=False",
    ):
        assert switch in reason
    assert "attn_pdrop" not in reason and "flash_layers" not in reason


def test_a_model_of_both_kinds(monkeypatch):
    """GIT's text attention computes its scores itself and is left; its vision attention has the interface and is swapped."""
    config = hf.GitConfig(**TOKENS, **BERT, vision_config=VISION)
    torch.manual_seed(0)
    model = hf.GitForCausalLM._from_config(config, attn_implementation="eager").eval()
    inputs = inputs_of(model, "right") | {"pixel_values": torch.randn(3, 3, 8, 8)}
    expected = model(**inputs).logits
    report = fastlm.replace(model)
    assert "GitSelfAttention does not go through" in report.swapped[""]
    calls = count_calls(monkeypatch)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert calls() == 1


def test_attention_that_makes_another_mask_of_its_own(monkeypatch):
    """DeepSeek 4 extends the mask by the keys it compresses, so it gets eager's masks, and runs on fastlm."""
    options = {"num_experts_per_tok": 2, "n_routed_experts": 2, "moe_intermediate_size": 32, "qk_rope_head_dim": 4}
    options |= {"layer_types": ["compressed_sparse_attention"] * 2, "mlp_layer_types": ["moe"] * 2, "sliding_window": 4}
    options |= {"q_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 2}
    deepseek = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    model = Architecture(deepseek.DeepseekV4ForCausalLM, {**LLAMA, **options}).build("fastlm")
    calls = count_calls(monkeypatch)
    close_to_eager(model, inputs_of(model))
    assert calls() == 2


def test_attention_for_eager_and_sdpa_alone():
    """DeepSeek 3.2 hides all keys that its indexer did not choose, but makes these masks for "eager" and "sdpa" only."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    reason = "DeepseekV32Attention prepares its mask for 'eager' and 'sdpa' alone"
    traits = transformers_attention.traits_of(deepseek.DeepseekV32Attention)
    assert traits.for_others in reason
    module = deepseek.DeepseekV32Attention.__new__(deepseek.DeepseekV32Attention)
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=reason):
        transformers_attention.attend(module, query, query, query, None)


# ---- what runs eager --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fastlm. LlamaAttention runs on transformers' eager attention")
@pytest.mark.parametrize("which", range(4))
def test_subclasses_of_tensor_are_eager_s(which):
    """DTensor and similar classes have no rule for fastlm's op."""
    module = ARCHITECTURES["Llama"].build("fastlm").model.layers[0].self_attn.eval()
    tensors = [torch.randn(2, heads, 6, 8) for heads in (4, 4 // module.num_key_value_groups, 4 // module.num_key_value_groups)]
    tensors.append(torch.zeros(2, 1, 6, 6))
    expected, _ = transformers_attention.attend(module, *tensors, scaling=0.3)
    tensors[which] = Wrapped(tensors[which])
    out, weights = transformers_attention.attend(module, *tensors, scaling=0.3)
    torch.testing.assert_close(out, expected)
    assert weights is not None


@pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:fastlm. BertSelfAttention runs on transformers' eager attention")
@pytest.mark.parametrize("padded", [False, True])
def test_a_trace_records_eager_s_ops(padded):
    model, eager = (hf.BertModel._from_config(hf.BertConfig(**BERT), attn_implementation=name) for name in ("fastlm", "eager"))
    eager.load_state_dict(model.state_dict())
    inputs, others = (torch.randint(3, 20, (2, 6)) for _ in range(2))
    masks = (torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]]),) if padded else ()
    model.eval().config.return_dict = eager.eval().config.return_dict = False
    traced = torch.jit.trace(model, (inputs, *masks), check_trace=False)
    torch.testing.assert_close(traced(others, *masks)[0], eager(others, *masks)[0])


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "Gemma 2", "GPT-OSS", "T5", "BART", "Whisper"])
def test_attention_weights_are_eager_s(name, monkeypatch):
    """Get weights and values from the model's own function, with one warning."""
    architecture = ARCHITECTURES[name]
    model, eager = architecture.build("fastlm"), architecture.build("eager")
    monkeypatch.setattr(transformers_attention, "_warned", set())
    calls = count_calls(monkeypatch)
    for padding, expected_warnings in (("right", True), (None, False)):
        inputs = inputs_of(model, None if name == "Whisper" else padding)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            actual = model(**inputs, output_attentions=True)
        assert any("attention weights were asked for" in str(w.message) for w in caught) == expected_warnings
        expected = eager(**inputs, output_attentions=True)
        for kind in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
            for ours, theirs in zip(actual.get(kind) or (), expected.get(kind) or (), strict=True):
                assert torch.equal(ours, theirs)
        assert torch.equal(actual.logits, expected.logits)
    assert calls() == 0 and (actual.get("attentions") or actual.get("cross_attentions"))


def test_arguments_that_only_eager_knows(monkeypatch):
    """Inkling 2 has a sink per query, so its own function runs, and replace() announces it."""
    inkling = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    users = [c for c in vars(inkling).values() if isinstance(c, type) and c.__module__ == inkling.__name__]
    users = [c for c in users if issubclass(c, torch.nn.Module) and "Attention" in c.__name__]
    cls = next(c for c in users if "sinks" in transformers_attention.traits_of(c).unknown)
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    module.num_key_value_groups = 2
    query, key, sinks = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 4, 3, 1)
    monkeypatch.setattr(transformers_attention, "_warned", set())
    mask = torch.zeros((), dtype=transformers_mask.CAUSAL).expand(2, 1, 3, 3)
    with pytest.warns(UserWarning, match="fastlm has no sinks"):
        actual, _ = transformers_attention.attend(module, query, key, key, mask, scaling=0.5, sinks=sinks)
    hidden = torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)
    expected, _ = inkling.eager_attention_forward(module, query, key, key, hidden, scaling=0.5, sinks=sinks)
    assert torch.equal(actual, expected)


def test_queries_that_all_sequences_share(monkeypatch):
    """Eager's products broadcast one batch of learned queries over all keys."""
    module = ARCHITECTURES["BERT"].build().bert.encoder.layer[0].attention.self
    query, key = torch.randn(1, 4, 3, 8), torch.randn(2, 4, 5, 8)
    mask = torch.tensor([[True] * 5, [True, False] * 2 + [True]])[:, None, None]
    monkeypatch.setattr(transformers_attention, "_warned", set())
    with pytest.warns(UserWarning, match="different batch sizes"):
        out, weights = transformers_attention.attend(module, query, key, key, mask)
    assert out.shape == (2, 3, 4, 8) and not weights[1, :, :, 1].any() and weights[0, :, :, 1].all()


# ---- masks ------------------------------------------------------------------------------------------------------------------


def spied_masks(monkeypatch, model, inputs: dict, **options) -> list:
    """Return the (mask, causal, window) of every call of fastlm's attention in one forward of a model."""
    seen, original = [], transformers_attention.attention

    def spy(*args, mask, causal, window, **kwargs):
        seen.append((mask, causal, window))
        return original(*args, mask=mask, causal=causal, window=window, **kwargs)

    monkeypatch.setattr(transformers_attention, "attention", spy)
    model(**inputs, **options)
    return seen


@pytest.mark.parametrize(
    "name, expected",
    [
        ("BERT", [(False, None)] * 2),
        ("Llama", [(True, None)] * 2),
        ("Mistral", [(True, (3, None))] * 2),
        ("Gemma 3", [(True, (3, None)), (True, None)]),
        ("ModernBERT", [(False, None), (False, (3, 3))]),
        ("BART", [(False, None)] * 2 + [(True, None), (False, None)] * 2),
    ],
)
def test_no_mask_is_built_without_padding(name, expected, monkeypatch):
    model = ARCHITECTURES[name].build("fastlm")
    seen = spied_masks(monkeypatch, model, inputs_of(model))
    assert [(causal, window) for _, causal, window in seen] == expected
    assert all(mask is None for mask, _, _ in seen)


def test_padding_of_an_encoder_takes_a_row_of_memory(monkeypatch):
    model = ARCHITECTURES["BERT"].build("fastlm")
    for mask, _, _ in spied_masks(monkeypatch, model, inputs_of(model, "right")):
        assert mask.dtype == torch.bool and mask.shape == (3, 1, LENGTH, LENGTH) and mask.stride(2) == 0


@pytest.mark.parametrize("name", ["GPT-2", "Mistral", "Gemma 3"])
def test_a_step_of_decoding_has_no_mask(name, monkeypatch):
    model = ARCHITECTURES[name].build("fastlm")
    inputs = inputs_of(model)
    cache = model(input_ids=inputs["input_ids"][:, :-1], use_cache=True).cache
    step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"], "cache": cache}
    for mask, causal, window in spied_masks(monkeypatch, model, step):
        assert mask is None and not causal and (window is None or name != "GPT-2")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma 2"])
def test_packed_sequences(name):
    """Positions that start again begin a new sequence, and no sequence sees another."""
    model = ARCHITECTURES[name].build("fastlm")
    ids = inputs_of(model)["input_ids"]
    positions = torch.tensor([*range(6), *range(4), *range(LENGTH - 10)]).expand(3, -1)
    close_to_eager(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 50
    rest = [model(input_ids=i, position_ids=positions, use_cache=False).logits[:, 6:] for i in (ids, changed)]
    assert torch.equal(*rest)


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_a_mask_of_the_user_s_own(kind, monkeypatch):
    """Use a mask of four dimensions as it is: here all tokens see a prefix, and the rest is causal."""
    model = ARCHITECTURES["Llama"].build("fastlm")
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    allowed[:, :5] = True
    mask = torch.zeros(3, 1, LENGTH, LENGTH).masked_fill(~allowed, torch.finfo(torch.float32).min)
    ids = inputs_of(model)["input_ids"]
    eager = ARCHITECTURES["Llama"].build("eager")(input_ids=ids, attention_mask=mask).logits
    actual = model(input_ids=ids, attention_mask=mask if kind == "float" else allowed.expand(3, 1, -1, -1)).logits
    torch.testing.assert_close(actual, eager)


def test_overlays():
    """Put into the mask what is added to a pattern or taken from it, and blocks whose tokens all see each other."""
    config, embeds = hf.LlamaConfig(**LLAMA, **TOKENS, sliding_window=4), torch.zeros(2, LENGTH, 32)
    blocks = torch.full((2, LENGTH), -1)
    blocks[:, 3:8] = 0
    cases = (
        {"or_mask_function": lambda b, h, q, k: k < 3},
        {"and_mask_function": lambda b, h, q, k: k != 2},
        {"block_sequence_ids": blocks},
    )
    for create in (create_causal_mask, create_sliding_window_causal_mask):
        for options in cases:
            masks = []
            for name in ("eager", "fastlm"):
                config._attn_implementation = name
                masks.append(create(config, embeds, None, None, **options))
            assert masks[1].dtype == torch.bool and torch.equal(masks[0] == 0, masks[1])


def test_masks_that_a_caller_needs_in_full():
    """transformers gets no stand-in if it asks for a mask to concatenate with another."""
    config, embeds = hf.LlamaConfig(**LLAMA, **TOKENS), torch.zeros(2, 5, 32)
    config._attn_implementation = "fastlm"
    mask = create_causal_mask(config, embeds, None, None, allow_is_causal_skip=False)
    assert torch.equal(mask, torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, -1, -1))
    mask = create_bidirectional_mask(config, embeds, None, allow_is_bidirectional_skip=False)
    assert torch.equal(mask, torch.ones(2, 1, 5, 5, dtype=torch.bool))


# ---- the rest ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention_mask", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3"])
def test_compiles_as_one_graph(name, attention_mask, monkeypatch):
    """Compile the loss and its gradients into the graph, too."""
    model = ARCHITECTURES[name].build("fastlm")
    inputs = inputs_of(model, "right")
    inputs = inputs if attention_mask else {"input_ids": inputs["input_ids"]}
    valid = valid_of(inputs) if attention_mask else ...
    expected = model(**inputs).logits[valid]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(**inputs).logits[valid]
    torch.testing.assert_close(actual, expected)
    wanted, found = (
        torch.autograd.grad(logits.square().sum(), model.get_input_embeddings().weight) for logits in (expected, actual)
    )
    torch.testing.assert_close(found, wanted)


def test_gradient_checkpointing(monkeypatch):
    """Each layer runs twice, and gives the same gradients bit for bit; with dropout, both runs drop the same weights."""
    gradients = []
    for checkpointing in (False, True):
        model = ARCHITECTURES["Gemma 3"].build("fastlm", attention_dropout=0.2).train()
        calls = count_calls(monkeypatch)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        logits = model(**inputs_of(model), use_cache=False).logits
        gradients.append(torch.autograd.grad(logits.square().sum(), model.get_input_embeddings().weight)[0])
        assert calls() == (4 if checkpointing else 2)
        monkeypatch.undo()
    assert torch.equal(*gradients)


def test_dropout_drops_its_share_in_training_only():
    """With the identity matrix as values, an output is its weights."""
    model = ARCHITECTURES["Llama"].build("fastlm", attention_dropout=0.25)
    module = model.model.layers[0].self_attn
    query, key = torch.randn(2, 4, 400, 8), torch.randn(2, 2, 400, 8)
    value = torch.eye(400).expand(2, 2, -1, -1)

    def weights(training: bool):
        module.train(training)
        return transformers_attention.attend(module, query, key, value, None, dropout=0.25, scaling=0.1)[0]

    full, dropped = weights(False), weights(True)
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    assert full.all()
    torch.testing.assert_close(dropped[kept], (full / 0.75)[kept])


def test_output_is_contiguous_without_a_copy(monkeypatch):
    model = ARCHITECTURES["Llama"].build("fastlm")
    original, outs = transformers_attention.attention, []
    monkeypatch.setattr(transformers_attention, "attention", lambda *a, **k: outs.append(original(*a, **k)) or outs[-1])
    model(**inputs_of(model))
    assert len(outs) == 2 and all(out.transpose(1, 2).is_contiguous() for out in outs)


def made_with_fastlm(config):
    config._attn_implementation = "fastlm"
    return hf.GPT2Model(config)


def swapped(config):
    model = hf.GPT2Model(config)
    fastlm.replace(model)
    return model


# The processes that load the models are forked from one that has imported transformers, which takes long, and not fastlm.
LOAD_AND_RUN = """
import os, pickle, sys, torch
import transformers.models.gpt2.modeling_gpt2
assert "fastlm" not in sys.modules
for file in FILES:
    if not os.fork():
        model = torch.load(file, weights_only=False) if file.endswith(".pt") else pickle.load(open(file, "rb"))
        total = model(torch.ones(1, 4, dtype=torch.long))[0].sum().item()
        print(total, model.config._attn_implementation, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_a_model_runs_where_fastlm_was_not_imported(tmp_path):
    files, expected = [], []
    for build in (swapped, made_with_fastlm):
        model = build(hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=1)).eval()
        files += [tmp_path / f"{build.__name__}.pt", tmp_path / f"{build.__name__}.pickle"]
        expected += [model(torch.ones(1, 4, dtype=torch.long))[0].sum().item()] * 2
        torch.save(model, files[-2])
        files[-1].write_bytes(pickle.dumps(model))
    shown = printed(f"FILES = {list(map(str, files))}{LOAD_AND_RUN}").splitlines()
    for line, wanted in zip(shown[-4:], expected, strict=True):
        total, implementation = line.split()
        assert implementation == "fastlm"
        torch.testing.assert_close(float(total), wanted)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_derivatives_of_second_order_go_through_a_model(name, widest_isa):
    """Take the tangent of a loss and the gradient of that tangent, and double backward, by the embeddings of the tokens."""

    def second_order(implementation, dtype):
        model = ARCHITECTURES[name].build(implementation).to(dtype)
        x, direction = (seeded_normal(i, (2, 5, model.config.hidden_size), dtype) for i in (1, 2))

        def loss(embeddings):
            return model(inputs_embeds=embeddings, use_cache=False)[0].square().mean()

        tangent = torch.func.jvp(loss, (x,), (direction,))[1]
        gradient = torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (direction,))[1])(x)
        x.requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return tangent, gradient, torch.autograd.grad((first * direction).sum(), x)[0]

    for result, golden in zip(second_order("fastlm", torch.float32), second_order("eager", torch.float64), strict=True):
        torch.testing.assert_close(result.double(), golden, rtol=1e-4, atol=1e-4 * golden.abs().max().item())


def test_fastlm_does_not_import_transformers():
    code = "import sys, fastlm; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert importlib.import_module("fastlm.integrations.transformers").NAME == "fastlm"
