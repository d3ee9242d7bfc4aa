"""A trained model behind HTTP, by transformers' own server, which ``transformers chat`` and OpenAI's clients talk to."""

import os
from pathlib import Path
from unittest.mock import patch

import fastlm.integrations.transformers  # noqa: F401  registers the swap of attention

from ...nn.replace import replace
from ..extras import require
from .checkpoint import CONFIG, kind_of
from .text_vae import TextVAE


def serve(model: str | os.PathLike, host: str = "localhost", port: int = 8000, continuous_batching: bool = False) -> None:
    """Run ``transformers serve`` with a model on fastlm's kernels, until it is interrupted.

    That server takes no ``attn_implementation="fastlm"``, as it knows transformers' own names alone. So the model is loaded
    under one of these and swapped before the first request.

    Args:
        model: the folder of a decoder, or of another model that transformers reads.
        continuous_batching: whether requests that come together are answered as one batch, which each joins and leaves by
            itself, with paged caches.

    Raises:
        ImportError: the server's libraries are missing.
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is that of a `TextVAE`, which transformers' server does not load.
    """
    if not (Path(model) / CONFIG).is_file():
        raise FileNotFoundError(f"{model} is no checkpoint, as it lacks {CONFIG}: fastlm lm train --model decoder")
    if kind_of(Path(model)) == TextVAE.config_class.model_type:
        raise ValueError(f"{model} is a TextVAE; the server takes a decoder: fastlm lm train --model decoder")
    require("serve", "fastapi", "uvicorn", "openai", "pydantic")
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    class Manager(model_manager.ModelManager):
        def _load_model(self, *arguments, **options):
            loaded = super()._load_model(*arguments, **options)
            replace(loaded)
            return loaded

    with patch.object(model_manager, "ModelManager", Manager):
        Serve(str(model), host=host, port=port, continuous_batching=continuous_batching)
