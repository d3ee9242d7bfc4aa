"""Train a decoder with transformers alone, as the language model of `fastlm lm` is compared with: CORPUS OUTPUT

The corpus is one that `fastlm lm prepare` made. Weights, sizes, texts and hyperparameters are those of `fastlm lm train --model
decoder`; the model (SDPA), the Trainer, its order of texts and its collator are transformers' own. `fastlm lm evaluate` and
`fastlm lm finetune` take the folder that is written.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fastlm.lm.data.batches import encode_text
from fastlm.lm.data.prepare import read_split
from fastlm.lm.data.tokenizer import begin_texts, load_tokenizer
from fastlm.lm.model.sizes import PRESETS, Preset
from fastlm.lm.training.settings import Settings


@dataclass
class Encoded(Dataset):
    """The token ids of texts; item i is a dict of text i's ``input_ids`` and ``labels``."""

    rows: list[list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def encoded(corpus: Path, split: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> Encoded:
    return Encoded([encode_text(record["text"], tokenizer, max_tokens) for record in read_split(corpus, split)])


def plain_decoder(size: Preset, tokenizer: PreTrainedTokenizerFast, attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.max_tokens,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def train(corpus: Path, output: Path, settings: Settings) -> None:
    set_seed(settings.seed)
    size = PRESETS[settings.preset]
    tokenizer = load_tokenizer(corpus)
    begin_texts(tokenizer)
    model = plain_decoder(size, tokenizer, "sdpa")
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=settings.weight_decay,
        adam_beta2=0.98,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=50,
        seed=settings.seed,
        report_to="none",
    )
    texts, validation = (encoded(corpus, split, tokenizer, size.max_tokens) for split in ("train", "validation"))
    trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), texts, validation)
    trainer.train()
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
