"""Generation of texts: samples from the prior, continuations of prompts, reconstructions, interpolations and variations."""

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
    """Add noise to logits, so that their argmax is a sample of their softmax (the Gumbel-max trick); each row has a seed.

    transformers' ``do_sample`` would draw all rows from torch's global generator, which a streaming thread shares with others.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores - log(E), E ~ Exp(1): (B, vocabulary)."""
        noise = torch.empty(scores.shape, dtype=torch.float64)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        return scores - noise.log().to(scores)


def processors(sampling: Sampling, seeds: list[int]) -> list[LogitsProcessor]:
    """Return the processors of the logits (B, vocabulary), of which the argmax is then taken, for rows with these seeds."""
    if not sampling.temperature:
        return []
    warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return [*warpers, Draw(seeds)]


class TextGenerator:
    """Generate texts with a `TextVAE`, or with a decoder alone, on the model's device.

    A text with its prompt has at most ``max_tokens`` tokens, the length that the model was made for; generation stops there.
    The same seed gives the same texts, whatever else is in the batch. torch's global generator is not used.

    A model of `fastlm.lm.translate` gets its source as the prompt, between the special tokens of its training, and gives the
    target alone, by default the likeliest one.

    Args:
        model, tokenizer: as `fastlm.lm.model.checkpoint.load` returns them.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_tokens = model.config.get_text_config().max_position_embeddings
        self.translates = tokenizer("")["input_ids"] == 2 * [tokenizer.bos_token_id]  # see `fastlm.lm.finetuning.translate`

    def sample(self, count: int = 1, *, prompt: str | Sequence[str] = "", seed: int = 0, **sampling) -> list[str]:
        """Return new texts; with a `TextVAE` each has its own latent from the prior N(0, 1).

        Args:
            count: the number of texts for each prompt.
            prompt: the beginning of the texts, or several; then the texts of the first prompt come first.
            sampling: the fields of `Sampling`.

        Raises:
            ValueError: an argument is bad, or a prompt leaves no room for more tokens.
        """
        check_at_least(1, count=count)
        prompts = [ids for ids in map(self._prompt, _listed(prompt)) for _ in range(count)]
        seeds = seeds_of(seed, count) * (len(prompts) // count)
        return self.generate(prompts, self._prior(seeds), seeds, self._sampling(sampling))

    def stream(self, prompt: str = "", *, seed: int = 0, **sampling) -> Iterator[str]:
        """Yield the one text that `sample` returns with these arguments in pieces, each as soon as its words are whole.

        An error in the generation is raised in the consumer of the pieces. Closing the iterator stops the generation.
        """
        seeds = seeds_of(seed, 1)
        return self._pieces(self._inputs([self._prompt(prompt)], self._prior(seeds), seeds, self._sampling(sampling)))

    def reconstruct(self, texts: str | Sequence[str]) -> list[str]:
        """Reconstruct each text: decode the mean of its posterior greedily. Tokens beyond ``max_tokens`` are ignored.

        Raises:
            ValueError: the model has no latent.
        """
        texts = _listed(texts)
        parts = [self.posterior(texts[start : start + BATCH])[0] for start in range(0, len(texts), BATCH)]
        return self.decode(torch.cat(parts)) if parts else []

    def interpolate(self, first: str, second: str, steps: int = 5) -> list[str]:
        """Return ``steps`` texts that lead from one text to another, including the reconstructions of both.

        The latents are on the straight line between the means of the posteriors, as in Bowman et al. 2016 and in Optimus.
        (Spherical interpolation, White 2016, arXiv:1609.04468, keeps the length of draws from the prior; means do not have it.)

        Raises:
            ValueError: there are fewer than 2 steps, or the model has no latent.
        """
        check_at_least(2, steps=steps)
        start, end = self.posterior([first, second])[0]
        return self.decode(torch.lerp(start, end, torch.linspace(0, 1, steps, device=start.device).to(start)[:, None]))

    def vary(self, text: str, count: int = 5, *, seed: int = 0) -> list[str]:
        """Return texts like this one: draw latents from its posterior, and decode each greedily.

        Raises:
            ValueError: the model has no latent.
        """
        check_at_least(1, count=count)
        mu, logvar = (part.expand(count, -1) for part in self.posterior([text]))
        return self.decode(reparameterize(mu, logvar, seed=self._seeds(seeds_of(seed, count))))

    @torch.inference_mode()
    def posterior(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (mu, logvar), each (B, D), of texts that are cut at ``max_tokens``."""
        if not isinstance(self.model, TextVAE):
            raise ValueError(f"this needs a model with a latent, a TextVAE; got a {type(self.model).__name__}")
        for text in texts:
            _check_text(text)
        rows = [torch.tensor(encode_text(text, self.tokenizer, self.max_tokens)) for text in texts]
        ids, mask = padded_ids(rows, self.tokenizer.pad_token_id)
        return self.model.posterior(ids.to(self.model.device), mask.to(self.model.device))

    def _prior(self, seeds: list[int]) -> Tensor | None:
        """Draw a latent per seed from the prior: (B, D), or None for a model without a latent."""
        if not isinstance(self.model, TextVAE):
            return None
        standard = torch.zeros(len(seeds), self.model.config.latent_dim, device=self.model.device, dtype=self.model.dtype)
        return reparameterize(standard, standard, seed=self._seeds(seeds))

    def _seeds(self, seeds: list[int]) -> Tensor:
        return torch.tensor(seeds, device=self.model.device)

    def _prompt(self, text: str) -> list[int]:
        _check_text(text)
        if self.translates and not text.strip():
            raise ValueError("this model goes from a source to a target: give it the source as the prompt")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        frame = [self.tokenizer.bos_token_id] * (1 + self.translates)
        if (most := self.max_tokens - len(frame) - 1) < len(ids):  # beside the frame and a token to write
            raise ValueError(f"a prompt must have at most {most} tokens; that of {text[:40]!r}… has {len(ids)}")
        return [*frame[:1], *ids, *frame[1:]]

    def _sampling(self, given: dict) -> Sampling:
        return Sampling(**({"temperature": GREEDY.temperature} if self.translates else {}) | given)

    def decode(self, latents: Tensor) -> list[str]:
        """Return the text of each latent of (B, D), decoded greedily."""
        return self.generate([self._prompt("")] * len(latents), latents, [0] * len(latents), GREEDY)

    def generate(self, prompts: list[list[int]], latents: Tensor | None, seeds: list[int], sampling: Sampling) -> list[str]:
        texts = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            inputs = self._inputs(prompts[part], None if latents is None else latents[part], seeds[part], sampling)
            width = inputs["input_ids"].shape[1]
            with quiet():  # transformers would warn of rows that are too long with their padding
                rows = self.model.generate(**inputs)
            for prompt, row in zip(prompts[part], rows):
                made = row[width : width + self._room(prompt, sampling)].tolist()
                text = self.tokenizer.decode(made if self.translates else [*prompt, *made], skip_special_tokens=True)
                texts.append(text.strip() if self.translates else text)
        return texts

    def _inputs(self, prompts: list[list[int]], latents: Tensor | None, seeds: list[int], sampling: Sampling) -> dict:
        """Return the arguments of transformers' ``generate``: the prompts, padded on the left, and how tokens are drawn.

        All rows run as long as the shortest prompt has room, so the caller cuts off what a longer prompt gets beyond its own.
        """
        ids, mask = padded_ids([torch.tensor(ids) for ids in prompts], self.tokenizer.pad_token_id, "left")
        inputs = {
            "input_ids": ids.to(self.model.device),
            "attention_mask": mask.to(self.model.device),
            "max_new_tokens": max(self._room(prompt, sampling) for prompt in prompts),
            "logits_processor": LogitsProcessorList(processors(sampling, seeds)),
            "do_sample": False,  # `Draw` samples
        }
        return inputs if latents is None else inputs | {"latents": latents}

    def _room(self, prompt: list[int], sampling: Sampling) -> int:
        most = sampling.max_new_tokens or self.model.generation_config.max_new_tokens  # that of `translate`, or None
        room = self.max_tokens - len(prompt)
        return room if most is None else min(room, most)

    def _pieces(self, inputs: dict) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=self.translates, skip_special_tokens=True)
        enough = Event()

        def stop(ids: Tensor, scores: Tensor, **rest) -> Tensor:
            return torch.full((len(ids),), enough.is_set(), device=ids.device)

        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(self.model.generate, **inputs, streamer=streamer, stopping_criteria=[stop])
            # The stream ends after an error too.
            written.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
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
    """Return the seeds of ``count`` texts; the first few do not depend on ``count``."""
    if seed not in range(2**32):  # torch's CPU generator reads 32 bits
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
