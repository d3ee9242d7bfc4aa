"""transformers' Trainer for texts: it orders them by the seed, logs the parts of the loss, and leaves no partial checkpoint."""

import math
import shutil
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...distributed import context_parallel
from ..data.batches import InRandomOrder
from ..model.evaluate import elbo
from ..model.text_vae import targets_of
from .schedules import kl_weight

CHECKPOINTS = "checkpoints"  # the folder, in that of the model
STATE = "trainer_state.json"  # the last file that the Trainer writes into a checkpoint


class Interrupted(KeyboardInterrupt):
    """A signal stopped the training, which has left a checkpoint."""


class TextTrainer(Trainer):
    """A Trainer whose epochs and noise depend on the seed alone: resumed and distributed runs give what one run gives.

    Args:
        batch_size: over all processes.
        group: the ranks that share the tokens of each text, of which the data collator returns this rank's; or None.
    """

    def __init__(self, *arguments, batch_size: int, group: "torch.distributed.ProcessGroup | None" = None, **keywords):
        super().__init__(*arguments, **keywords)
        self.remove_callback(PrinterCallback)
        self.batch_size, self.group = batch_size, group
        self.tokens, self._start = 0, time.perf_counter()
        self._sums = {}

    def _get_train_sampler(self, train_dataset=None) -> InRandomOrder:
        copies = 1 if self.group is None else self.group.size()
        return InRandomOrder(self.train_dataset, self.batch_size, shares=self.args.world_size // copies, copies=copies)

    def _context(self) -> AbstractContextManager:
        return nullcontext() if self.group is None else context_parallel(self.group)

    def training_step(self, *arguments, **keywords) -> torch.Tensor:
        with self._context():
            return super().training_step(*arguments, **keywords)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the Trainer's loss, and add up the parts of a `TextVAE`'s loss in this process."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.tokens = self.tokens + num_items_in_batch  # a tensor on a GPU, which is not waited for
        parts = {"labels": (targets_of(inputs["labels"], inputs.get("shift_labels")) >= 0).sum()}
        if getattr(outputs, "kl", None) is not None:
            parts |= {"kl": outputs.kl.sum(), "reconstruction": outputs.reconstruction.sum()}
        self._sums = {name: self._sums.get(name, 0) + part for name, part in parts.items()}
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments, **keywords) -> None:
        if "loss" in logs:
            parts = torch.stack([part.float() for part in self._sums.values()])
            sums = dict(zip(self._sums, self.accelerator.reduce(parts, "sum").tolist()))
            labels = sums.pop("labels")
            logs |= {name: part / labels for name, part in sums.items()}
            if "kl" in sums:
                logs["kl_weight"] = self.accelerator.unwrap_model(self.model).kl_weight
            now = time.perf_counter()
            logs["tokens_per_second"] = float(self.tokens) / (now - self._start)
            self._sums, self.tokens, self._start = {}, 0, now
        super().log(logs, *arguments, **keywords)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Return the negative ELBO of the validation texts, or their NLL without a latent, in nats per token."""
        texts = eval_dataset or self.eval_dataset
        batches = texts.batches(self.batch_size, self.data_collator.plain())
        with self._context():
            found = elbo(self.accelerator.unwrap_model(self.model), batches)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._start = time.perf_counter()
        return metrics

    def _save_checkpoint(self, model, trial) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            part = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"{part} could not be written; the checkpoints before it are whole: {error}") from error


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, or None; a process that is killed while it writes one leaves a partial one."""
    whole = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / STATE).is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Annealing(TrainerCallback):
    """Set the weight of the KL before each step."""

    def __init__(self, schedule: str, beta: float, warm_start: float):
        self.schedule, self.options = schedule, {"beta": beta, "warm_start": warm_start}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.kl_weight = kl_weight(self.schedule, state.global_step / state.max_steps, **self.options)


class Frozen(TrainerCallback):
    """Put rows of the embedding back after each step, as neither a gradient of zero nor a mask holds off weight decay.

    Args:
        ids: (rows,).
        vectors: (rows, width).
    """

    def __init__(self, ids: torch.Tensor, vectors: torch.Tensor):
        self.ids, self.vectors = ids, vectors

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight[self.ids.to(weight.device)] = self.vectors.to(weight)


class Interrupt(TrainerCallback):
    """End training after the current step, with a checkpoint, on Ctrl-C or a cluster's SIGTERM; at once on a second Ctrl-C."""

    def __init__(self):
        self.asked, self._before = False, {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # all processes must end after the same step
            asked = torch.tensor(float(self.asked), device=args.device)  # NCCL sends nothing from a CPU
            torch.distributed.all_reduce(asked)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Progress(TrainerCallback):
    """Show a progress bar with the loss and the tokens per second, and a line for each evaluation."""

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"} | ({"kl": f"{logs['kl']:.3f}"} if "kl" in logs else {})
            self.bar.set_postfix(shown | {"tokens/s": f"{logs['tokens_per_second']:.0f}"})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        line = f"epoch {state.epoch:.1f}: validation loss {metrics['eval_loss']:.3f} nats per token"
        line += f", perplexity {math.exp(min(metrics['eval_loss'], 50)):.1f}"
        if "eval_kl" in metrics:
            line += f", of it KL {metrics['eval_kl']:.3f}"
        self.bar.write(line, file=self.bar.fp)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
