"""fastlm as a kernel of Hugging Face's kernels library, which this folder is: ``kernels.get_local_kernel(hf_kernels.PATH)``.

By its name transformers takes it where it takes no other name of ours, as in ``transformers serve``:

    export LOCAL_KERNELS=fastlm/flash-attn=$(python -c "from fastlm.integrations import hf_kernels as k; print(k.PATH)")
    transformers serve MODEL --continuous-batching --attn-implementation fastlm/flash-attn

The name is free, but for a slash and "flash", by which transformers knows kernels and lets them batch continuously. The kernels
library loads this file by its path, so that it imports fastlm by name. (Tried with kernels 0.17.2; transformers 5.24 asks for
0.18.2, and was tried with the other one's version said to be that.)
"""

from pathlib import Path

from torch import Tensor, nn

from fastlm.integrations.transformers import continuous_batching
from fastlm.integrations.transformers.attention import attend
from fastlm.integrations.transformers.mask import make_mask

PATH = Path(__file__).parent
supports_flash_attn = True  # With the function below, it makes a kernel an implementation of attention to transformers.


def flash_attn_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Attend for transformers' attention modules, with the masks of "sdpa", which transformers gives to kernels.

    These are None where a mask would be causal alone. The arguments and results are those of `attend`.
    """
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and not continuous_batching.is_batched(kwargs) and queries > 1:
        causal = kwargs.get("is_causal")
        if getattr(module, "is_causal", True) if causal is None else causal:
            attention_mask = make_mask(query.shape[0], queries, keys, keys - queries)
    return attend(module, query, key, value, attention_mask, **kwargs)


continuous_batching.admit(flash_attn_forward)
