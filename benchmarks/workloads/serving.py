"""Answer requests by transformers' continuous batching: prompts that come together, and are gone on with as one batch."""

import logging

import torch
from suite.rows import Step
from torch import nn

PROMPT, NEW_TOKENS = 128, 16
VOCABULARY = 4096


def served() -> nn.Module:
    """Build a Llama of 2 layers, 8 heads on 4 of keys, of width 512."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    # Tied embeddings make a token follow itself, so that no rounding chooses another.
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=VOCABULARY, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def answers(model: nn.Module, requests: int, prompt: int, new_tokens: int) -> Step:
    """Read the prompts and write tokens behind each. Return the log-probabilities of these, (requests, new tokens)."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    prompts = torch.randint(VOCABULARY, (requests, prompt), generator=torch.Generator().manual_seed(1)).tolist()
    greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = {"page_size": 64, "num_blocks": 2 * requests * (prompt + new_tokens) // 64, "max_batch_tokens": 2048}
    batching = ContinuousBatchingConfig(**pages, return_logprobs=True)

    def step() -> tuple[torch.Tensor, ...]:
        outputs = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=batching)
        return (torch.tensor([output.logprobs for output in outputs.values()]),)

    return step


def continuous_batching(requests: int) -> dict:
    """Return the fields of a `workloads.models.Model`, all but how fastlm gets in."""
    return {
        "name": "Llama of 2 layers, continuous batching",
        "workload": f"{requests} requests of {PROMPT} tokens",
        "unit": "tokens/s",
        "items": requests * NEW_TOKENS,
        "build": served,
        "ready": lambda model: answers(model, requests, PROMPT, NEW_TOKENS),
        "checked": lambda model: answers(model, 3, 20, 6),
        "deferred": True,  # It runs in a thread of its own.
    }
