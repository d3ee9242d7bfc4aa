"""Test llama.cpp as a peer of whole models, with a library in its place."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from workloads import model_peers


class ALibrary:
    """Stand in for llama_cpp: a model whose logits are the token and its position."""

    llama_model_default_params = llama_context_default_params = SimpleNamespace

    def __init__(self):
        self.removed, self.freed = [], 0

    def llama_model_load_from_file(self, file, options):
        assert not options.use_mmap and Path(file.decode()).read_bytes() == b"weights"
        return "model"

    def llama_init_from_model(self, model, options):
        self.sequences, self.room = options.n_seq_max, options.n_ctx
        return "context"

    def llama_n_batch(self, context):
        return 6

    def llama_batch_init(self, tokens, *_):
        return SimpleNamespace(
            **{name: [0] * tokens for name in ("token", "pos", "n_seq_id", "logits")}, seq_id=[[0] for _ in range(tokens)]
        )

    def llama_decode(self, context, batch):
        rows = [i for i in range(batch.n_tokens) if batch.logits[i]]
        self.rows = [[float(batch.token[i]), float(batch.pos[i]), float(batch.seq_id[i][0])] for i in rows]
        return 0

    def llama_get_logits(self, context):
        flat = [value for row in self.rows for value in row]
        return ctypes.cast((ctypes.c_float * len(flat))(*flat), ctypes.POINTER(ctypes.c_float))

    def llama_get_memory(self, context):
        return "memory"

    def llama_memory_seq_rm(self, memory, sequence, begin, end):
        self.removed.append((sequence, begin, end))

    def _free(self, _):
        self.freed += 1

    llama_batch_free = llama_free = llama_model_free = _free


def test_llama_cpp_reads_prompts_in_parts_and_forgets(monkeypatch):
    library = ALibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setattr(model_peers, "write_gguf", lambda model, file: file.write_bytes(b"weights"))
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=3))
    prompt = torch.arange(10).view(2, 5)
    reader = model_peers.LlamaCppReader(model, prompt, room=4, random_cache=True)
    assert (library.sequences, library.room) == (2, 2 * 9)
    logits = reader(torch.tensor([[70], [80]]))
    assert torch.equal(logits, torch.tensor([[[70.0, 5.0, 0.0]], [[80.0, 5.0, 1.0]]]))
    reader(torch.tensor([[71], [81]]))
    reader.forget(2)
    assert library.removed == [(0, 5, -1), (1, 5, -1)]
    assert torch.equal(reader(torch.tensor([[70], [80]])), logits)
    del reader
    assert library.freed == 3
