"""Train a decoder with transformers alone, as the language model of `fastlm lm` is compared with: CORPUS OUTPUT

The corpus is one that `fastlm lm prepare` made. Sizes, texts and hyperparameters are those of `fastlm lm train --model
decoder`; the model (SDPA), the Trainer, its order of texts and its collator are transformers' own. `fastlm lm evaluate` and
`fastlm lm finetune` take the folder that is written.
"""

import argparse
from pathlib import Path

from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastlm.lm.data.batches import encode_text
from fastlm.lm.data.prepare import read_split
from fastlm.lm.data.tokenizer import begin_texts, load_tokenizer
from fastlm.lm.model.presets import decoder_config
from fastlm.lm.model.sizes import PRESETS
from fastlm.lm.training.settings import Settings
from fastlm.lm.training.train import hyperparameters


def encoded(corpus: Path, split: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> list[dict[str, list[int]]]:
    """Return a split's texts as the Trainer takes them."""
    rows = (encode_text(record["text"], tokenizer, max_tokens) for record in read_split(corpus, split))
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def train(corpus: Path, output: Path, settings: Settings) -> None:
    """Train a decoder on a corpus, and write it with its tokenizer into ``output``."""
    set_seed(settings.seed)
    size = PRESETS[settings.preset]
    tokenizer = load_tokenizer(corpus)
    begin_texts(tokenizer)
    model = LlamaForCausalLM._from_config(decoder_config(size, tokenizer), attn_implementation="sdpa")
    arguments = TrainingArguments(
        output_dir=str(output),
        **hyperparameters(settings),
        per_device_train_batch_size=settings.batch_size,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=50,
        report_to="none",
    )
    texts, validation = (encoded(corpus, split, tokenizer, size.max_tokens) for split in ("train", "validation"))
    Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), texts, validation).train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default=Settings.preset)
    parser.add_argument("--epochs", type=float, default=Settings.epochs)
    arguments = parser.parse_args()
    train(arguments.corpus, arguments.output, Settings(model="decoder", preset=arguments.preset, epochs=arguments.epochs))


if __name__ == "__main__":
    main()
