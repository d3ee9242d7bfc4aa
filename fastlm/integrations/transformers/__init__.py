"""fastlm's attention in the models of Hugging Face transformers: ``attn_implementation="fastlm"``.

Importing this module registers the name with transformers, so that

    AutoModel.from_pretrained(name, attn_implementation="fastlm")
    model.set_attn_implementation("fastlm")
    fastlm.replace(model)  # on a model at hand; fastlm.restore(model) goes back to what it had

run every attention that goes through transformers' AttentionInterface on `fastlm.attention`, with the results of ``eager``:
grouped queries, windows, softcap, sinks, position biases (with their gradient), dropout, caches and padding.

What stays on transformers' own path:

- A call that asks for attention weights (``output_attentions=True``), or that has an argument which the model's eager function
  knows and fastlm does not, runs that eager function and warns once.
- An attention that computes its scores itself, without the interface, stays as it is; `fastlm.replace` reports it. A model with
  such an attention, or with one that makes another mask of the one it gets, receives eager's float masks.
- An attention that prepares its mask for "eager" and "sdpa" alone raises NotImplementedError. With another name it would attend
  to keys that it means to hide.

After `fastlm.replace`, caches of `generate` grow in place (cache.py), and encoders like BERT's drop the padding of their
batches (packing.py). Their output is zeros there, where eager has numbers without a meaning, so give padding no labels (-100,
as transformers' collators do). Models that read it, as those for question answering, compute it.

Packed sequences, a batch of one row from `DataCollatorWithFlattening`, are attended to each by itself, without a mask and
without padding (sequences.py): where positions begin anew, or by ``cu_seq_lens_q`` and ``cu_seq_lens_k``, which count if both
are given. A graph of torch.compile, and rows of packed sequences beside one another, have a mask.

Continuous batching (``model.generate_batch``, ``fastlm lm serve --continuous-batching``) takes "fastlm", on CPUs too: requests
that decode are attended to in their pages (continuous_batching.py).

A model on fastlm can be pickled, or sent to a worker, and used where fastlm has not been imported: its pickle imports it. (For
this the class of transformers' configs gets a ``__getstate__``.)

`WatchCallback` logs what attention does (`fastlm.watch`) at the Trainer's logging steps.

A query that sees no key gets zeros, where eager gives it the mean of all values. In transformers' masks only padded positions
see no key, and no other position sees them, so the outputs of all other positions are the same.
"""

from collections.abc import Iterable

from torch import nn

from ...nn.replace import Swap, register
from ..extras import require

require("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel  # noqa: E402

from . import cache, continuous_batching, packing  # noqa: E402
from . import conv1d as conv1d  # noqa: E402  (registers its swap)
from .attention import attend  # noqa: E402
from .mask import make_mask  # noqa: E402
from .traits import computes_attention, own_switches, traits_of, uses_interface  # noqa: E402

NAME = "fastlm"


class _Imported(str):
    """The name of an implementation. To unpickle it imports this module, which registers the name with transformers."""

    __slots__ = ()


def _state(config: PreTrainedConfig) -> dict:
    """Return what a pickle of a config keeps."""
    state = dict(vars(config))
    if state.get("_attn_implementation_internal") == NAME:
        state["_attn_implementation_internal"] = _Imported(NAME)
    return state


class AttentionSwap(Swap):
    """The swap that sets ``attn_implementation="fastlm"`` on a model, and on every model inside it whose attention can take it.

    The earlier implementation is kept on each module as ``fastlm_replaced``.
    """

    original = PreTrainedModel
    subclasses = True

    def why_not(self, module: PreTrainedModel) -> str | None:
        parts = list(map(type, module.modules()))
        if not any(map(uses_interface, parts)):
            own = _names(filter(computes_attention, parts))
            return _without_interface(module, own) if own else "it has no attention to exchange"
        for cls in filter(uses_interface, parts):
            if reason := traits_of(cls).for_others:
                return f"{cls.__name__} {reason}"
        if module.config.output_attentions:
            return "its config asks every call for attention weights (output_attentions)"
        return None

    def is_swapped(self, module: nn.Module) -> bool:
        return (
            isinstance(module, PreTrainedModel) and module.config._attn_implementation == NAME and self.why_not(module) is None
        )

    def swap(self, module: PreTrainedModel) -> str:
        before = module.config._attn_implementation
        parts = [part for part in module.modules() if self._takes_part(part)]
        for part in parts:
            if part.config._attn_implementation != NAME:  # else it was swapped before, by itself
                part.fastlm_replaced = part.config._attn_implementation
        for part in parts:
            _set(part, NAME)
        return f"attn_implementation {before!r} -> {NAME!r}{_exceptions(module)}"

    def undo(self, module: PreTrainedModel) -> str:
        for part in module.modules():  # a model comes before its attentions, which mostly share its config
            before = vars(part).pop("fastlm_replaced", "")
            if getattr(getattr(part, "config", None), "_attn_implementation", None) == NAME:
                model = part if isinstance(part, PreTrainedModel) else module
                # A model that was made with "fastlm" has no earlier implementation, and gets the default.
                _set(part, before or model.get_correct_attn_implementation(None))
        return f"attn_implementation {NAME!r} -> {module.config._attn_implementation!r}"

    def _takes_part(self, part: nn.Module) -> bool:
        if isinstance(part, PreTrainedModel):
            return self.why_not(part) is None
        return uses_interface(type(part)) and isinstance(getattr(part, "config", None), PreTrainedConfig)


class CacheSwap(Swap):
    """The swap that lets the caches of a model that generates grow in place, as fastlm's attention reads them so."""

    original = PreTrainedModel
    subclasses = True

    def concerns(self, module: nn.Module) -> bool:
        return super().concerns(module) and module.config._attn_implementation == NAME and module.can_generate()

    def is_swapped(self, module: nn.Module) -> bool:
        return cache.is_hooked(module)

    def swap(self, module: PreTrainedModel) -> str:
        cache.hook(module)
        return "its caches grow in place"

    def undo(self, module: PreTrainedModel) -> str:
        cache.unhook(module)
        return "its caches are transformers' own"


class PackingSwap(Swap):
    """The swap that drops the padding of a model's batches before its encoder, once the model runs on fastlm."""

    original = PreTrainedModel
    subclasses = True

    def concerns(self, module: nn.Module) -> bool:
        if not super().concerns(module) or module.config._attn_implementation != NAME:
            return False
        return not getattr(module.config, "is_decoder", False) and any(map(packing.is_open, module.modules()))

    def why_not(self, module: PreTrainedModel) -> str | None:
        if not packing.reads_padding(module):
            return None
        for encoder in filter(packing.is_encoder, module.modules()):
            packing.close(encoder)
        return f"{type(module).__name__} reads the encoder's output at padding, too, so that this is computed"

    def is_swapped(self, module: nn.Module) -> bool:
        return isinstance(module, PreTrainedModel) and any(map(packing.is_hooked, module.modules()))

    def swap(self, module: PreTrainedModel) -> str:
        for encoder in filter(packing.is_open, module.modules()):
            packing.hook(encoder)
        return "padding is dropped before its encoder's first layer, and comes back after the last as zeros"

    def undo(self, module: PreTrainedModel) -> str:
        for encoder in filter(packing.is_encoder, module.modules()):
            packing.unhook(encoder)
        return "padding is computed"


def _set(part: nn.Module, implementation: str) -> None:
    # The key "" names this config alone; the configs inside it have modules of their own.
    part.config._attn_implementation = {"": implementation}


def _exceptions(model: PreTrainedModel) -> str:
    """Return a text on the parts of a swapped model that do not always run on fastlm."""
    parts = set(map(type, model.modules()))
    unknown = {cls.__name__: ", ".join(traits_of(cls).unknown) for cls in filter(uses_interface, parts)}
    reasons = [f"{name} runs eager where it is given {given}" for name, given in unknown.items() if given]
    if own := _names(filter(computes_attention, parts)):
        reasons.append(_without_interface(model, own))
    return "".join(f"; {what}" for what in sorted(reasons))


def _without_interface(model: PreTrainedModel, attentions: str) -> str:
    """Return why the attentions of a model stay as they are, and how else they may reach fastlm."""
    switches = ", ".join(own_switches(model))
    other = f"; it has a switch of its own ({switches}), and fastlm.use() takes what it calls" if switches else ""
    return f"{attentions} does not go through transformers' AttentionInterface{other}"


def _names(classes: Iterable[type]) -> str:
    return ", ".join(sorted({cls.__name__ for cls in classes}))


def __getattr__(name: str):
    """Import the callback when it is asked for, because transformers' Trainer takes seconds to import."""
    if name != "WatchCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .callback import WatchCallback

    return WatchCallback


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
continuous_batching.admit(attend)
PreTrainedConfig.__getstate__ = _state
register(AttentionSwap())
register(CacheSwap())
register(PackingSwap())
