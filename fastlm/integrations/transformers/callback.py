"""Log what attention does while transformers' Trainer trains a model that runs on fastlm."""

import math

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...nn.layer_stats import LayerStats
from ...nn.watch import watch


class WatchCallback(TrainerCallback):
    """Log the statistics of `fastlm.watch`, collected over all steps since the last log, at the Trainer's logging steps.

    ``Trainer(..., callbacks=[WatchCallback()])`` adds them to the console's logs and to ``trainer.state.log_history``. What
    reports to TensorBoard, W&B and the like comes first among a Trainer's callbacks and would miss them:
    ``WatchCallback().add_to(trainer)`` puts this one before them.

    Logged are, for layer i in the order of the model's modules (``layers`` holds their names):

        attention/entropy/layer_i           the mean over rows and heads, in nats
        attention/lowest_entropy/layer_i    the lowest of its heads' means, which falls to 0 where a head collapses
        attention/max_logit/layer_i         the largest score since the last log, which QK-clip holds down
        attention/first_key_mass/layer_i    with ``key_mass``: the share of the first position, the mean over heads
        attention/entropy, attention/max_logit    the mean, and the largest, of all layers

    Only training steps count, not evaluation. In distributed training they are those of the process that logs. If a step ends
    by an exception, call `close`, which removes the hooks from the model.

    Args:
        key_mass: as in `fastlm.watch`.

    Attributes:
        stats: the `fastlm.watch`, or None before training. It is reset at each log.
        layers: the names of the layers in the last log.
    """

    def __init__(self, *, key_mass: bool = False) -> None:
        self.key_mass = key_mass
        self.stats: watch | None = None
        self.layers: list[str] = []

    def add_to(self, trainer: Trainer) -> "WatchCallback":
        """Put this callback before all others of a Trainer, so that all of them are given the statistics; return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def close(self) -> None:
        """Remove the hooks from the model, if they are there."""
        if self.stats is not None and self.stats.is_open:
            self.stats.__exit__(None, None, None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model, **kwargs) -> None:
        """Make the watch of the model that is trained."""
        self.close()
        self.stats = watch(model, key_mass=self.key_mass)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Begin to watch."""
        self.close()
        self.stats.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Stop watching, because an evaluation may come."""
        self.close()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Stop watching."""
        self.close()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs) -> None:
        """Add the statistics to the log of a training step."""
        if not logs or "loss" not in logs or not self.stats:
            return
        found = self._metrics()
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
        self.stats.reset()

    def _metrics(self) -> dict[str, float]:
        layers = dict(self.stats)
        self.layers = list(layers)
        metrics: dict[str, float] = {}
        for i, layer in enumerate(layers.values()):
            metrics |= {f"attention/{name}/layer_{i}": float(value) for name, value in _numbers(layer).items()}
        entropies = [metrics[f"attention/entropy/layer_{i}"] for i in range(len(layers))]
        largest = max(metrics[f"attention/max_logit/layer_{i}"] for i in range(len(layers)))
        return metrics | {"attention/entropy": sum(entropies) / len(entropies), "attention/max_logit": largest}


def _numbers(layer: LayerStats) -> dict[str, Tensor]:
    """Return what is logged of a layer."""
    numbers = {
        "entropy": layer.entropy.nanmean(),
        "lowest_entropy": layer.entropy.nan_to_num(nan=math.inf).min(),
        "max_logit": layer.max_logit.max(),
    }
    if layer.key_mass is not None and layer.key_mass.shape[1]:
        numbers["first_key_mass"] = layer.key_mass[:, 0].mean()
    return numbers
