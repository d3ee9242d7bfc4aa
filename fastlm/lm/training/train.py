"""Pre-training of a `TextVAE`, or of the decoder alone, new or from a checkpoint, on a prepared corpus, by the Trainer."""

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments, set_seed

from ..data.batches import Collator, Texts
from ..data.prepare import REPORT, prepare
from ..data.tokenizer import FILE as TOKENIZER
from ..data.tokenizer import begin_texts, load_tokenizer
from ..model.checkpoint import CONFIG, WEIGHTS, check_whole, load, quiet, save
from ..model.presets import build
from ..model.text_vae import TextVAE
from ..model.vectors import use_vectors
from .context_parallel import PartCollator, groups_of, own_group
from .curves import write_curves
from .settings import SETTINGS, Settings, settings_of
from .trainer import CHECKPOINTS, Annealing, Frozen, Interrupt, Interrupted, Progress, TextTrainer, last_checkpoint

LOG_STEPS, SAVE_STEPS = 10, 1000  # a checkpoint is written every SAVE_STEPS steps, or after each epoch if that is earlier


def train(
    output: str | os.PathLike,
    corpus: str | os.PathLike | None = None,
    settings: Settings | None = None,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] | None = None,
    context_parallel: int = 1,
) -> Path:
    """Train a model, and write its checkpoint, settings.json, curves.csv and curves.png into ``output``.

    During training, ``output``/checkpoints has checkpoints to resume from; they are removed when the model is whole. Under
    torchrun all processes call this function.

    Args:
        corpus: a folder that `prepare` made; None for Python's own documentation, prepared in ``output``/corpus.
        settings: None for the defaults, or, where a run is resumed, for that run's settings.
        resume: go on from the last checkpoint, or from the beginning if there is none yet; the result has the same bits as that
            of a run without the interruption. A run that is complete is left as it is.
        callbacks: the Trainer's callbacks; None for a progress bar.
        context_parallel: how many of torchrun's processes, in a row, share the tokens of each text; such groups share the texts
            of a batch. A run may be resumed with other numbers of both: the losses are the same, to rounding.

    Returns:
        ``output``.

    Raises:
        ValueError: a setting is bad, or does not fit the processes; ``output`` holds another run; the run to resume is damaged,
            or its corpus has changed.
        FileNotFoundError: there is no such corpus, or nothing to resume.
        OSError: the disk is full; the earlier checkpoints are whole.
        Interrupted: Ctrl-C or SIGTERM stopped the training, which has left a checkpoint.
    """
    output = Path(output)
    settings, corpus = _course(output, corpus, settings, resume)
    if resume and (output / CONFIG).exists():
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        return output
    arguments = _arguments(output, settings, groups_of(context_parallel))
    group = own_group(context_parallel, arguments.ddp_timeout)
    first = arguments.process_index == 0
    with arguments.main_process_first(desc="the corpus"):
        if corpus is None:
            corpus = output / "corpus"
            if not (corpus / REPORT).exists():
                prepare(None, corpus)
    check_prepared(corpus)
    model, tokenizer, frozen = _model(settings, corpus, say=first and not resume)
    kept = asdict(settings) | {"corpus": str(Path(corpus).resolve()), "corpus_digest": digest_of(corpus)}
    last = _last_checkpoint(output, kept) if resume else None
    interrupt = Interrupt()
    shown = [Progress()] * first if callbacks is None else callbacks
    trainer = _trainer(settings, corpus, model, tokenizer, arguments, [*frozen, interrupt, *shown], group)
    if first and not resume:
        output.mkdir(parents=True, exist_ok=True)
        (output / SETTINGS).write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    with quiet():
        trainer.train(resume_from_checkpoint=last and str(last))
    if first:
        write_curves(trainer.state.log_history, output)
    if interrupt.asked:
        raise Interrupted(f"a checkpoint is in {last_checkpoint(output / CHECKPOINTS)}")
    if first:
        save(trainer.model, tokenizer, output)
    trainer.accelerator.wait_for_everyone()
    if first:
        shutil.rmtree(output / CHECKPOINTS)  # optimizer states of twice the model's size, and pickles
    return output


def _course(
    output: Path, corpus: str | os.PathLike | None, settings: Settings | None, resume: bool
) -> tuple[Settings, Path | None]:
    """Return the settings and the corpus to train with, or raise an error before anything is overwritten."""
    if not resume:
        if (output / SETTINGS).exists() or (output / CONFIG).exists():
            raise ValueError(f"output must be a new folder; {output} holds a model: go on with it by --resume, or name another")
        return settings or Settings(), Path(corpus) if corpus else None
    before, corpus_before = settings_of(output)
    if settings not in (None, before):
        differ = [name for name, value in asdict(settings).items() if value != getattr(before, name)]
        raise ValueError(f"a run is resumed with its own settings; {output} has another {', '.join(differ)}")
    if corpus is not None and Path(corpus).resolve() != corpus_before:
        raise ValueError(f"a run is resumed on its own corpus; {output} was trained on {corpus_before}, not on {corpus}")
    return before, corpus_before


def _last_checkpoint(output: Path, kept: dict) -> Path | None:
    """Return the checkpoint to resume from, after checking that it is whole, or None if there is none yet."""
    if json.loads((output / SETTINGS).read_text("utf-8")) != kept:
        raise ValueError(f"{kept['corpus']} has changed since {output} was begun: a run is resumed on its own corpus")
    last = last_checkpoint(output / CHECKPOINTS)
    if last is not None:
        check_whole(last / WEIGHTS)
        for path in last.glob("*.pt*"):
            if not zipfile.is_zipfile(path):
                raise ValueError(f"{path} is damaged or cut short: remove {last}, and resume from the checkpoint before it")
    return last


def check_prepared(corpus: str | os.PathLike) -> None:
    """Raise a FileNotFoundError unless ``corpus`` is a prepared corpus with a vocabulary."""
    if not (Path(corpus) / REPORT).is_file():
        raise FileNotFoundError(f"{corpus} is no prepared corpus: make one, fastlm lm prepare TEXTS --output {corpus}")
    if not (Path(corpus) / TOKENIZER).is_file():
        raise FileNotFoundError(f"{corpus} has no vocabulary, as its --vocab-size was 0: prepare it again with one")


def digest_of(corpus: str | os.PathLike) -> str:
    """Return a digest of a prepared corpus: of its vocabulary, and of its report, which describes the texts."""
    digest = blake2b(digest_size=16)
    for name in (TOKENIZER, REPORT):
        digest.update((Path(corpus) / name).read_bytes())
    return digest.hexdigest()


def _model(
    settings: Settings, corpus: Path, say: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[TrainerCallback]]:
    """Return the model to begin with, its tokenizer, and what keeps its frozen vectors; if ``say``, tell what they match."""
    if settings.start:
        model, tokenizer = load(settings.start)
        if isinstance(model, TextVAE):
            model.config.free_bits = model.latent.free_bits = settings.free_bits
        return model, tokenizer, []
    tokenizer = load_tokenizer(corpus)
    begin_texts(tokenizer)
    latent = {"free_bits": settings.free_bits, "mean_std": settings.mean_std}
    model = build(settings.model, settings.preset, tokenizer, **latent, seed=settings.seed)
    if not settings.vectors:
        return model, tokenizer, []
    matched = use_vectors(model, tokenizer, settings.vectors, frozen=settings.freeze_vectors)
    if say:
        print(f"{settings.vectors}: {matched}")
    return model, tokenizer, [Frozen(matched.ids, matched.vectors)] if settings.freeze_vectors else []


def _trainer(
    settings: Settings,
    corpus: str | os.PathLike,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
    group: "torch.distributed.ProcessGroup | None",
) -> TextTrainer:
    set_seed(settings.seed)
    vae = isinstance(model, TextVAE)
    most = model.config.get_text_config().max_position_embeddings
    texts, validation = (Texts(corpus, split, tokenizer, most, settings.seed) for split in ("train", "validation"))
    arguments.eval_steps = arguments.save_steps = min(SAVE_STEPS, -(-len(texts) // settings.batch_size))
    noise = {"dropout": settings.word_dropout, "masking": settings.span_masking}
    collate = Collator(tokenizer, encoder=vae, packed=group is None, **noise)
    if group is not None:
        collate = PartCollator(collate, tokenizer.pad_token_id, group.rank(), group.size())
    annealing = [Annealing(settings.kl_schedule, settings.beta, settings.warm_start)] if vae else []
    callbacks = [*annealing, *callbacks]
    return TextTrainer(
        model, arguments, collate, texts, validation, batch_size=settings.batch_size, group=group, callbacks=callbacks
    )


def hyperparameters(settings: Settings) -> dict:
    """Return the Trainer's arguments for what is learned, in whatever shares and dtype."""
    return {
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # a share of all steps
        "weight_decay": settings.weight_decay,
        "adam_beta2": 0.98,
        "seed": settings.seed,
    }


def _arguments(output: Path, settings: Settings, shares: int) -> TrainingArguments:
    """Return the Trainer's arguments for a batch in so many shares. Their creation starts torch.distributed under torchrun."""
    if settings.batch_size % shares:
        raise ValueError(f"batch_size must be a multiple of the {shares} processes that share it; got {settings.batch_size}")
    on_cpu = not torch.accelerator.is_available()
    return TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        **hyperparameters(settings),
        per_device_train_batch_size=settings.batch_size // shares,
        bf16=settings.bfloat16,
        logging_steps=LOG_STEPS,
        eval_strategy="steps",
        eval_on_start=bool(settings.start),  # to compare with
        save_strategy="steps",
        eval_steps=SAVE_STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
