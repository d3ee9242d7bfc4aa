"""fastlm under the name flash_attn: who finds it, what is absent, that uninstall undoes all, and models that run on it.

Models of transformers under flash_attention_2 are held to eager by the rule of tests/support/oracle.py.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, util
from types import ModuleType

import diffusers.utils.import_utils as found_by_diffusers
import pytest
import torch
import transformers as hf
from diffusers.models import attention_dispatch
from packaging.version import Version
from support.transformers_models import ARCHITECTURES, LENGTH, Architecture, assert_as_good_as_eager, inputs_of
from transformers import modeling_flash_attention_utils as flash_of_transformers
from transformers import utils as utils_of_transformers
from transformers.models.gpt_neo import modeling_gpt_neo

from fastlm.integrations import flash_attn
from fastlm.integrations.flash_attn import functions, installation


@pytest.fixture
def installed():
    """Install for one test."""
    assert flash_attn.install()
    yield
    flash_attn.uninstall()


@pytest.fixture
def calls(monkeypatch) -> Callable[[], int]:
    """Return a function that tells how often fastlm's attention has run, to prove that it ran."""
    count = []
    for name in ("attention", "varlen_attention"):
        original = getattr(functions, name)

        def counted(*args, original=original, **kwargs):
            count.append(kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(functions, name, counted)
    return lambda: len(count)


# ---- the name ---------------------------------------------------------------------------------------------------------------


def test_every_part_is_fastlm_s(installed):
    assert importlib.import_module("flash_attn").__version__ == flash_attn.__version__
    for name, source in installation.PACKAGE.modules.items():
        theirs, ours = importlib.import_module(name), importlib.import_module(source)
        assert theirs.__name__ == name and ours.__name__ == ours.__spec__.name == source
        names = {
            key: value for key, value in vars(theirs).items() if not (key.startswith("__") or isinstance(value, ModuleType))
        }
        assert all(value is vars(ours)[key] for key, value in names.items())
    from flash_attn.layers.rotary import RotaryEmbedding
    from flash_attn.modules.mha import FlashSelfAttention

    assert RotaryEmbedding.__module__.startswith("fastlm.") and FlashSelfAttention.__module__.startswith("fastlm.")


def test_the_distribution(installed):
    assert Version(metadata.version("flash_attn")) >= Version(flash_attn.__version__) >= Version("2.6.3")
    assert metadata.version("flash-attn") == metadata.distribution("Flash_Attn").version
    assert metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert util.find_spec("flash_attn") is not None
    assert [d.version for d in metadata.distributions(name="torch")] == [metadata.version("torch")]


@pytest.mark.parametrize("name", ["ops.rms_norm", "ops.triton.layer_norm", "losses.cross_entropy", "models.gpt", "cute"])
def test_what_is_absent_is_named(name, installed):
    """Raise an ImportError, as where flash_attn is missing, which is what guards look for."""
    with pytest.raises(ImportError, match=rf"No module named 'flash_attn\.{name.split('.')[0]}'"):
        importlib.import_module(f"flash_attn.{name}")
    with pytest.raises(ImportError, match="ParallelMHA"):
        from flash_attn.modules.mha import ParallelMHA  # noqa: F401


@pytest.mark.parametrize("loaded", [False, True], ids=["installed", "imported"])
def test_a_real_one_stays(loaded, tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    if loaded:
        importlib.import_module("flash_attn")
        monkeypatch.syspath_prepend("")
    assert not flash_attn.install()
    assert importlib.import_module("flash_attn").real
    flash_attn.uninstall()
    assert importlib.import_module("flash_attn").real
    assert not utils_of_transformers.is_flash_attn_2_available()
    sys.modules.pop("flash_attn")


def state() -> dict:
    """Return all that install changes, as it is."""
    names = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "flash_attn"}
    flags = (found_by_diffusers._flash_attn_available, found_by_diffusers._flash_attn_version)
    return {
        "modules": names,
        "finders": list(sys.meta_path),
        "answers": [module.is_flash_attn_2_available for module in (utils_of_transformers, flash_of_transformers, hf.utils)],
        "answer": utils_of_transformers.is_flash_attn_2_available(),
        "newer": utils_of_transformers.is_flash_attn_greater_or_equal("2.6.3"),
        "table": dict(flash_of_transformers.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]),
        "loaded": [getattr(flash_of_transformers, name) for name in installation._LOADED],
        "late": hasattr(modeling_gpt_neo, "_flash_attention_forward"),
        "diffusers": (*flags, attention_dispatch._CAN_USE_FLASH_ATTN, attention_dispatch.flash_attn_func),
    }


def test_uninstall_undoes_all():
    before = state()
    assert not (before["modules"] or before["answer"] or before["newer"] or before["late"])
    for _ in range(2):
        assert flash_attn.install() and flash_attn.install()
        model = ARCHITECTURES["Llama"].build("flash_attention_2")
        model(**inputs_of(model, "left"))
        during = state()
        assert all(during[what] != before[what] for what in before)
        flash_attn.uninstall()
        flash_attn.uninstall()
        assert state() == before
    with pytest.raises(ModuleNotFoundError, match="No module named 'flash_attn'"):
        importlib.import_module("flash_attn")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("flash-attn")
    with pytest.raises(ImportError, match="FlashAttention2"):
        ARCHITECTURES["Llama"].build("flash_attention_2")


LATER = """
import sys
import fastlm.integrations.flash_attn as flash_attn
assert "transformers" not in sys.modules and "diffusers" not in sys.modules
assert flash_attn.install()
from diffusers.utils import is_flash_attn_available, is_flash_attn_version
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX, lazy_import_flash_attention
from transformers.utils import is_flash_attn_2_available
assert is_flash_attn_available() and is_flash_attn_version(">=", "2.6.3") and is_flash_attn_2_available()
assert any(check() for check, device in FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["supported_devices"])
assert lazy_import_flash_attention("flash_attention_2")[0][0] is flash_attn.flash_attn_func
flash_attn.uninstall()
from transformers.utils import is_flash_attn_2_available
assert not is_flash_attn_available() and not is_flash_attn_2_available()
try:
    lazy_import_flash_attention("flash_attention_2")
except ImportError:
    print("refused")
"""


def test_libraries_that_are_imported_later():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LATER], capture_output=True, text=True, timeout=120)
    assert done.stdout == "refused\n", done.stderr


def test_a_transformers_that_is_too_old_is_left_alone(monkeypatch):
    def refuse(library: str) -> None:
        raise ImportError(f"{library} is old")

    monkeypatch.setattr(installation, "require", refuse)
    with pytest.warns(UserWarning, match="transformers is old"):
        assert flash_attn.install()
    assert not utils_of_transformers.is_flash_attn_2_available()
    flash_attn.uninstall()


# ---- models -----------------------------------------------------------------------------------------------------------------

MODELS = ["BERT", "GPT-2", "Llama", "Qwen2 with a window", "Mistral", "Gemma 2", "ModernBERT"]


@pytest.fixture
def quiet():
    """Silence transformers, which tells for each model that a GPU would be faster."""
    hf.utils.logging.set_verbosity_error()
    yield
    hf.utils.logging.set_verbosity_warning()


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name, padding, installed, calls, quiet):
    architecture = ARCHITECTURES[name]
    dtype = torch.bfloat16 if padding == "right" else torch.float32
    assert_as_good_as_eager(architecture.build().train(), dtype, padding, gradients=True, implementation="flash_attention_2")
    assert calls() == architecture.attentions


@pytest.mark.parametrize("name", ["BART", "Whisper"])
def test_encoders_and_decoders(name, installed, calls, quiet):
    """Leave padding out: with a padded encoder, transformers drops queries of the cross-attention under flash_attention_2."""
    architecture = ARCHITECTURES[name]
    assert_as_good_as_eager(architecture.build(), torch.float32, None, gradients=True, implementation="flash_attention_2")
    assert calls() == architecture.attentions


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-2"])
def test_sequences_packed_by_their_positions(name, installed, calls, quiet):
    """Give in one row, without a mask, what eager gives for each sequence alone."""
    eager, flash = (ARCHITECTURES[name].build(kind) for kind in ("eager", "flash_attention_2"))
    parts = [torch.randint(3, 60, (1, length)) for length in (5, LENGTH, 1, 4)]
    expected = torch.cat([eager(part).logits for part in parts], 1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    actual = flash(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(actual, expected)
    assert calls() == ARCHITECTURES[name].attentions


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-2", "Gemma 2"])
def test_generating(name, padding, installed, quiet):
    eager, flash = (ARCHITECTURES[name].build(kind) for kind in ("eager", "flash_attention_2"))
    inputs = inputs_of(eager, padding)
    options = {"min_new_tokens": 10, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(flash.generate(**inputs, **options), eager.generate(**inputs, **options))


def test_a_model_whose_module_was_imported_before(installed, quiet):
    """Give GPT-Neo what it imports only where there is a flash_attn."""
    options = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
    architecture = Architecture(hf.GPTNeoForCausalLM, options)
    eager, flash = (architecture.build(kind) for kind in ("eager", "flash_attention_2"))
    inputs = inputs_of(eager)
    torch.testing.assert_close(flash(**inputs).logits, eager(**inputs).logits)


def test_diffusers_that_was_imported_before(installed, calls):
    q, k, v = torch.randn(3, 2, 9, 4, 16)
    native = attention_dispatch.dispatch_attention_fn(q, k, v)
    for backend in ("flash", "flash_varlen"):
        with attention_dispatch.attention_backend(backend):
            torch.testing.assert_close(attention_dispatch.dispatch_attention_fn(q, k, v), native)
    assert calls() == 2
