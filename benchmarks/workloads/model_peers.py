"""Run a model by what a user would pick instead of fastlm: zentorch's compiler, or llama.cpp with the model's weights."""

import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def compiled_by_zentorch(model: nn.Module) -> type[AbstractContextManager]:
    """Compile the model for AMD's processors. zentorch serves inference, and one version of torch."""
    import zentorch  # noqa: F401  (registers the compiler's backend)

    model.compile(backend="zentorch")
    return torch.inference_mode


def read_by_llama_cpp(model: nn.Module) -> type[AbstractContextManager]:
    """Give the model llama.cpp's reader, which `models.decoding` asks for logits in place of the model."""
    import gguf  # noqa: F401
    import llama_cpp

    llama_cpp.llama_log_set(_unheard(), None)
    model.reader = LlamaCppReader
    return nullcontext


@cache  # llama.cpp holds its address alone.
def _unheard() -> Callable:
    """Return the callback for llama.cpp's log that drops it; otherwise it fills the terminal."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCppReader:
    """Read tokens by llama.cpp: float16 weights and caches, the product's sums in float32, nothing quantised further.

    It takes the arguments of `models.CachedReader` and answers as that does, but has to read a prompt to fill its caches.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, room: int, random_cache: bool):
        import llama_cpp

        self.api, (self.batch, length) = llama_cpp, prompt.shape
        self.vocabulary, self.position = model.config.vocab_size, 0
        with tempfile.TemporaryDirectory() as folder:  # The weights are read, not mapped, so that the file may go.
            file = Path(folder) / "model.gguf"
            write_gguf(model, file)
            options = llama_cpp.llama_model_default_params()
            options.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise NotImplementedError("llama.cpp could not load the model")
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max, options.n_ctx = self.batch, self.batch * (length + room)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise NotImplementedError("llama.cpp could not make a context")
        self.chunk = llama_cpp.llama_n_batch(self.context) // self.batch
        self.tokens = llama_cpp.llama_batch_init(self.chunk * self.batch, 0, 1)
        weakref.finalize(self, _free, llama_cpp, self.tokens, self.context, self.model)
        for part in prompt.split(self.chunk, dim=1):
            self._decode(part, logits=False)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, 1, V), float32, of the last of ``tokens`` (B, L)."""
        self._decode(tokens, logits=True)
        rows = self.api.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(rows, shape=(self.batch, self.vocabulary))
        return torch.from_numpy(logits.copy()).unsqueeze(1)

    def forget(self, count: int) -> None:
        """Remove the last ``count`` tokens from the caches."""
        self.position -= count
        memory = self.api.llama_get_memory(self.context)
        for sequence in range(self.batch):
            self.api.llama_memory_seq_rm(memory, sequence, self.position, -1)

    def _decode(self, tokens: Tensor, logits: bool) -> None:
        """Read ``tokens`` (B, L), and compute the ``logits`` of the last ones."""
        batch, length = self.tokens, tokens.shape[1]
        batch.n_tokens = tokens.numel()
        for i, token in enumerate(tokens.flatten().tolist()):
            batch.token[i], batch.pos[i] = token, self.position + i % length
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // length
            batch.logits[i] = logits and i % length == length - 1
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not read the tokens")
        self.position += length


def _free(api, tokens, context, model) -> None:
    api.llama_batch_free(tokens)
    api.llama_free(context)
    api.llama_model_free(model)


# ---- a model's file for llama.cpp -------------------------------------------------------------------------------------------


def write_gguf(model: nn.Module, file: Path) -> None:
    """Write a GPT-2's or Qwen2's weights in float16 as llama.cpp reads them, without a tokenizer."""
    import gguf

    config, kind = model.config, model.config.model_type
    architecture = {"gpt2": gguf.MODEL_ARCH.GPT2, "qwen2": gguf.MODEL_ARCH.QWEN2}[kind]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if kind == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in _named_weights(model):
        # llama.cpp wants vectors in float32.
        kept = tensor.float() if tensor.dim() == 1 else tensor.to(torch.float16)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), kept.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight once. Matrices are (out, in), as torch.nn.Linear has them and transformers' Conv1D has not."""
    from transformers.pytorch_utils import Conv1D

    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().T if name in transposed else parameter.detach()
