"""Using a model: texts of a latent from the prior or after a prompt, reconstructions, interpolations and variations."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...ops.latent import reparameterize
from ..data.batches import encode_text, padded_ids
from .checkpoint import quiet
from .sampling import GREEDY, Sampling, check_at_least
from .text_vae import TextVAE

BATCH = 32


class Draw(LogitsProcessor):
    """Noise on logits, so that the largest is a draw of their softmax (the Gumbel-max trick), each row's of its own seed.

    transformers' ``do_sample`` would draw all rows from torch's one generator, which a thread that streams shares with all.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, vocabulary): scores - log(E), E ~ Exp(1)."""
        noise = torch.empty(scores.shape, dtype=torch.float64)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        return scores - noise.log().to(scores)


def processors(sampling: Sampling, seeds: list[int]) -> list[LogitsProcessor]:
    """What is done with logits before the largest is taken, in rows of these seeds."""
    if not sampling.temperature:
        return []
    warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return [*warpers, Draw(seeds)]


class TextGenerator:
    """Writes texts with a `TextVAE`, or with a decoder alone, on the device where it is.

    No text, its prompt included, is longer than the ``max_tokens`` that the model was made for; one that gets there just stops.
    The same seed gives the same texts, whatever else is written beside them, and torch's own generator is left alone.

    Args:
        model, tokenizer: as `fastlm.lm.checkpoint.load` gives them.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_tokens = model.config.get_text_config().max_position_embeddings

    def sample(self, count: int = 1, *, prompt: str | Sequence[str] = "", seed: int = 0, **sampling) -> list[str]:
        """New texts; those of a `TextVAE` each have a latent of their own, from the prior N(0, 1).

        Args:
            count: texts for each prompt.
            prompt: what the texts begin with; of several, the texts of the first come first.
            sampling: how tokens are drawn, by the names of `Sampling`.

        Raises:
            ValueError: a bad argument, or a prompt that leaves no room for more.
        """
        check_at_least(1, count=count)
        prompts = [ids for ids in map(self._prompt, _listed(prompt)) for _ in range(count)]
        seeds = seeds_of(seed, count) * (len(prompts) // count)
        return self.generate(prompts, self._prior(seeds), seeds, Sampling(**sampling))

    def stream(self, prompt: str = "", *, seed: int = 0, **sampling) -> Iterator[str]:
        """The one text that `sample` writes with these arguments, in pieces, each as soon as its words are whole.

        An error while it is written is raised where the pieces are taken. Who takes no more of them stops the writing.
        """
        seeds = seeds_of(seed, 1)
        return self._pieces(self._inputs([self._prompt(prompt)], self._prior(seeds), seeds, Sampling(**sampling)))

    def reconstruct(self, texts: str | Sequence[str]) -> list[str]:
        """Each text as the mean of its posterior tells it, greedily. Of a text beyond ``max_tokens`` the rest is not seen.

        Raises:
            ValueError: the model has no latent.
        """
        texts = _listed(texts)
        parts = [self.posterior(texts[start : start + BATCH])[0] for start in range(0, len(texts), BATCH)]
        return self.decode(torch.cat(parts)) if parts else []

    def interpolate(self, first: str, second: str, steps: int = 5) -> list[str]:
        """``steps`` texts on the way from one text to another, their reconstructions included.

        The way is the straight line between the means of their posteriors, as in Bowman et al. 2016 and in Optimus. (A
        spherical one, White 2016, arXiv:1609.04468, keeps the length of draws from the prior, which means do not have.)

        Raises:
            ValueError: fewer than 2 steps; the model has no latent.
        """
        check_at_least(2, steps=steps)
        start, end = self.posterior([first, second])[0]
        return self.decode(torch.lerp(start, end, torch.linspace(0, 1, steps, device=start.device).to(start)[:, None]))

    def vary(self, text: str, count: int = 5, *, seed: int = 0) -> list[str]:
        """Texts like this one: latents drawn from its posterior, each told greedily.

        Raises:
            ValueError: the model has no latent.
        """
        check_at_least(1, count=count)
        mu, logvar = (part.expand(count, -1) for part in self.posterior([text]))
        return self.decode(reparameterize(mu, logvar, seed=self._seeds(seeds_of(seed, count))))

    @torch.inference_mode()
    def posterior(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (B, D), of texts cut at ``max_tokens``."""
        if not isinstance(self.model, TextVAE):
            raise ValueError(f"this needs a model with a latent, a TextVAE; got a {type(self.model).__name__}")
        for text in texts:
            _check_text(text)
        rows = [torch.tensor(encode_text(text, self.tokenizer, self.max_tokens)) for text in texts]
        ids, mask = padded_ids(rows, self.tokenizer.pad_token_id)
        return self.model.posterior(ids.to(self.model.device), mask.to(self.model.device))

    def _prior(self, seeds: list[int]) -> Tensor | None:
        """(B, D): a latent of each seed, for a model that has one."""
        if not isinstance(self.model, TextVAE):
            return None
        standard = torch.zeros(len(seeds), self.model.config.latent_dim, device=self.model.device, dtype=self.model.dtype)
        return reparameterize(standard, standard, seed=self._seeds(seeds))

    def _seeds(self, seeds: list[int]) -> Tensor:
        return torch.tensor(seeds, device=self.model.device)

    def _prompt(self, text: str) -> list[int]:
        _check_text(text)
        ids = [self.tokenizer.bos_token_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        if len(ids) >= self.max_tokens:
            most = self.max_tokens - 2  # beside <|bos|> and a token to write
            raise ValueError(f"a prompt must have at most {most} tokens; that of {text[:40]!r}… has {len(ids) - 1}")
        return ids

    def decode(self, latents: Tensor) -> list[str]:
        """The texts of latents (B, D), greedily."""
        return self.generate([self._prompt("")] * len(latents), latents, [0] * len(latents), GREEDY)

    def generate(self, prompts: list[list[int]], latents: Tensor | None, seeds: list[int], sampling: Sampling) -> list[str]:
        texts = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            inputs = self._inputs(prompts[part], None if latents is None else latents[part], seeds[part], sampling)
            width = inputs["input_ids"].shape[1]
            with quiet():  # of rows that with their padding are long
                rows = self.model.generate(**inputs)
            for prompt, row in zip(prompts[part], rows):
                ids = [*prompt, *row[width : width + self._room(prompt, sampling)].tolist()]
                texts.append(self.tokenizer.decode(ids, skip_special_tokens=True))
        return texts

    def _inputs(self, prompts: list[list[int]], latents: Tensor | None, seeds: list[int], sampling: Sampling) -> dict:
        """Of transformers' ``generate``: the prompts, padded on the left, and how tokens are drawn.

        All rows go on for as long as the shortest has room, so that what a longer one gets beyond its own is to be cut off.
        """
        ids, mask = padded_ids([torch.tensor(ids) for ids in prompts], self.tokenizer.pad_token_id, "left")
        inputs = {
            "input_ids": ids.to(self.model.device),
            "attention_mask": mask.to(self.model.device),
            "max_new_tokens": max(self._room(prompt, sampling) for prompt in prompts),
            "logits_processor": LogitsProcessorList(processors(sampling, seeds)),
            "do_sample": False,  # `Draw` does
        }
        return inputs if latents is None else inputs | {"latents": latents}

    def _room(self, prompt: list[int], sampling: Sampling) -> int:
        room = self.max_tokens - len(prompt)
        return room if sampling.max_new_tokens is None else min(room, sampling.max_new_tokens)

    def _pieces(self, inputs: dict) -> Iterator[str]:
        streamer, enough = TextIteratorStreamer(self.tokenizer, skip_special_tokens=True), Event()

        def stop(ids: Tensor, scores: Tensor, **rest) -> Tensor:
            return torch.full((len(ids),), enough.is_set(), device=ids.device)

        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(self.model.generate, **inputs, streamer=streamer, stopping_criteria=[stop])
            written.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))  # also after an error
            try:
                yield from filter(None, streamer)
            finally:
                enough.set()
            written.result()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 1,
    *,
    prompt: str | Sequence[str] = "",
    seed: int = 0,
    **sampling,
) -> list[str]:
    """Return new texts of a model, or texts that go on from a prompt: see `TextGenerator.sample`."""
    return TextGenerator(model, tokenizer).sample(count, prompt=prompt, seed=seed, **sampling)


def seeds_of(seed: int, count: int) -> list[int]:
    """Of ``count`` texts: that of the first is the same, however many there are."""
    if seed not in range(2**32):  # what torch's generator on the CPU heeds
        raise ValueError(f"seed must be from 0 to 2**32 - 1; got {seed}")
    return torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str; got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text must be Unicode: {error}") from None
