"""Fine-tuning for speech to text: transformers' Whisper or wav2vec2, on fastlm's kernels, on a folder of recordings."""

import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Wav2Vec2ForCTC,
    WhisperForConditionalGeneration,
)
from transformers.audio_utils import load_audio

from ..data.clean import clean
from ..data.numbers import NUMBERS, english
from ..data.problems import Problems
from ..extras import require
from ..files import replaced_together
from ..model.checkpoint import CONFIG, kind_of, quiet
from ..model.presets import ATTENTION, on_kernels
from ..model.text_vae import IGNORED
from .common import Tuning, check_new, finetune, problem_lines, split_examples, write_report

MODELS = {"whisper": WhisperForConditionalGeneration, "wav2vec2": Wav2Vec2ForCTC}
HEADS = {"whisper": (), "wav2vec2": ("lm_head",)}
SPOKEN = 300  # numbers that espeak-ng speaks
VOICES = ("en", "en-us", "en-gb-scotland")
BATCH = 8  # recordings to transcribe together


@dataclass
class Speech:
    """The results of a model on the test recordings, stored beside it as metrics.json.

    Attributes:
        data: what the recordings are.
        train, validation, test: the numbers of recordings to train on, to choose the epoch by and to test on.
        wer: jiwer's word error rate, without case and punctuation: the words that were wrong, missing or too many, over those
            that were said.
        exact: the share of the test recordings without an error.
        problems: the recordings that could not be read.
    """

    data: str
    train: int
    validation: int
    test: int
    wer: float
    exact: float
    problems: Problems

    def __str__(self) -> str:
        lines = [
            f"data             {self.data}",
            f"recordings       {self.train} to train on, {self.validation} to choose the epoch by, {self.test} to test on",
            f"word error rate  {self.wer:.1%} (without case and punctuation)",
            f"exact match      {self.exact:.1%} of the test recordings",
        ]
        return "\n".join(lines) + problem_lines(self.problems)


def transcribe(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    data: str | os.PathLike | None = None,
    *,
    tuning: Tuning | None = None,
) -> Speech:
    """Teach a Whisper or a wav2vec2 to write what is said, and test it.

    ``output`` then holds the model and its processor, which transformers' ``pipeline("automatic-speech-recognition")`` reads,
    with metrics.json and predictions.csv of the test recordings.

    Args:
        checkpoint: the folder of a Whisper, or of a wav2vec2 with a vocabulary, as transformers saves them.
        data: a folder of recordings; beside each NAME.wav is its text, NAME.txt. None for numbers that espeak-ng speaks. A
            tenth is for validation and a tenth for the test, by a hash of the name.

    Raises:
        ImportError: the libraries for speech are missing.
        FileNotFoundError: there is no such checkpoint or folder, or no espeak-ng.
        ValueError: ``output`` holds a checkpoint; the checkpoint is of another model; there are too few recordings.
        OSError: the disk is full; ``output`` is unchanged.
    """
    require("speech", "soundfile", "soxr", "jiwer")
    output, tuning, kind = check_new(output), tuning or Tuning(), _kind(Path(checkpoint))
    with TemporaryDirectory() as spoken:
        if data is None:
            speak(Path(spoken))
        what = str(data) if data is not None else f"{SPOKEN} numbers below 10,000 in English, spoken by espeak-ng"
        problems = Problems()
        with quiet():
            processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
        rate = processor.feature_extractor.sampling_rate
        source = Path(data or spoken)
        items = items_of(source, recordings(source, problems), processor, rate, problems)
    examples = split_examples(((item["file"], item) for item in items), problems=problems)
    examples.check(data or "espeak-ng")
    train, validation, test = ([item for _, item in part] for part in (examples.train, examples.validation, examples.test))
    with quiet():
        model = MODELS[kind].from_pretrained(checkpoint, attn_implementation=ATTENTION, local_files_only=True)
    on_kernels(model)
    names: list[str] = []
    with replaced_together(output, names) as folder:
        collate = Batches(processor, getattr(model.config, "decoder_start_token_id", None))
        model = finetune(model, tuning, HEADS[kind], train, validation, collate, folder / "epochs")
        wanted, found = [item["text"] for item in test], listen(model, processor, test)
        result = Speech(data=what, **examples.counts, **scores(wanted, found), problems=problems)
        write_report(folder, result, ("file", "text", "predicted"), zip((item["file"] for item in test), wanted, found))
        with quiet():
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        names += sorted((path.name for path in folder.iterdir() if path.is_file()), key=lambda name: name == CONFIG)
    return result


def _kind(folder: Path) -> str:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint, as it lacks {CONFIG}: save a Whisper or a wav2vec2 there")
    if (kind := kind_of(folder)) not in MODELS:
        raise ValueError(f"{folder} is a checkpoint of a model of type {kind!r}; speech needs {' or '.join(map(repr, MODELS))}")
    return kind


# ---- the recordings ---------------------------------------------------------------------------------------------------------


def speak(folder: Path) -> None:
    """Let espeak-ng say numbers, and write NAME.wav and NAME.txt of each.

    Raises:
        FileNotFoundError: there is no espeak-ng.
    """
    if which("espeak-ng") is None:
        raise FileNotFoundError(
            "espeak-ng speaks the ready recordings, and is not installed (apt install espeak-ng, brew install espeak-ng); "
            "or give DATA, a folder of NAME.wav and NAME.txt"
        )
    for index in range(SPOKEN):
        text = english(NUMBERS[index * len(NUMBERS) // SPOKEN])
        command = ["espeak-ng", "-v", VOICES[index % len(VOICES)], "-w", str(folder / f"{index:03}.wav"), text]
        subprocess.run(command, check=True, capture_output=True)
        (folder / f"{index:03}.txt").write_text(text, "utf-8")


def recordings(folder: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """Yield (path inside the folder, text) of each recording; one without a text goes to ``problems``."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of recordings")
    for path in sorted(folder.rglob("*.wav")):
        written = path.with_suffix(".txt")
        try:
            text = clean(written.read_text("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            problems.add(path, f"{written.name} has no text", detail=f": {error}")
            continue
        if text:
            yield path.relative_to(folder).as_posix(), text
        else:
            problems.add(path, f"{written.name} is empty")


def items_of(
    folder: Path, pairs: Iterable[tuple[str, str]], processor: ProcessorMixin, rate: int, problems: Problems
) -> list[dict]:
    """Return file, text, ``audio`` (samples,) at the model's rate, and ``input_ids`` of each recording that can be read."""
    items = []
    for path, text in pairs:
        try:
            audio = load_audio(str(folder / path), sampling_rate=rate, backend="soundfile")
        except (OSError, RuntimeError, ValueError) as error:  # soundfile's own are RuntimeErrors
            problems.add(folder / path, "no recording", detail=f": {error}")
            continue
        ids = processor.tokenizer(_spelled(text, processor)).input_ids
        items.append({"file": path, "text": text, "audio": np.asarray(audio, np.float32), "input_ids": ids})
    return items


def _spelled(text: str, processor: ProcessorMixin) -> str:
    """Return the text in capitals if the vocabulary has no small letters, as that of many a wav2vec2."""
    return text.upper() if "a" not in processor.tokenizer.get_vocab() else text


class Batches:
    """Make a batch: the features of the recordings, and ``labels`` (B, L), padded by -100.

    ``start``, the token that a Whisper puts in front of its labels itself, is none of them.
    """

    def __init__(self, processor: ProcessorMixin, start: int | None):
        self.processor, self.start = processor, start

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        texts = (item["input_ids"] for item in items)
        labels = [torch.tensor(ids[1:] if ids[0] == self.start else ids) for ids in texts]
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {**features(self.processor, items), "labels": padded}


def features(processor: ProcessorMixin, items: Sequence[dict]) -> dict[str, Tensor]:
    """Return the model's inputs for recordings of different lengths."""
    extractor = processor.feature_extractor
    options = {"padding": True} if "input_values" in extractor.model_input_names else {}
    made = extractor([item["audio"] for item in items], sampling_rate=extractor.sampling_rate, return_tensors="pt", **options)
    return dict(made)


# ---- the results ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def listen(model: PreTrainedModel, processor: ProcessorMixin, items: Sequence[dict]) -> list[str]:
    """Return what the model writes for each recording."""
    longest = max(len(item["input_ids"]) for item in items)
    found = []
    for start in range(0, len(items), BATCH):
        inputs = {name: part.to(model.device) for name, part in features(processor, items[start : start + BATCH]).items()}
        if isinstance(model, WhisperForConditionalGeneration):
            with quiet():  # transformers would warn that the checkpoint's own length is not used
                ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        else:
            ids = model(**inputs).logits.argmax(-1)
        found += processor.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in found]


def scores(wanted: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Return ``wer`` and ``exact``, without case and punctuation."""
    import jiwer

    plain = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()])
    wanted, found = plain(list(wanted)), plain(list(found))
    return {"wer": jiwer.wer(wanted, found), "exact": sum(map(str.__eq__, wanted, found)) / len(wanted)}
