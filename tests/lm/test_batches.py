"""Batches have every text, whole and once; seed and epoch alone determine their order and noise."""

import pytest
import torch

from fastlm.lm.data.batches import Collator, InRandomOrder, Texts, encode_text, seed_of
from fastlm.lm.data.prepare import read_split
from fastlm.lm.model.text_vae import IGNORED


@pytest.fixture
def texts(corpus, tokenizer):
    return Texts(corpus, "train", tokenizer, 128, seed=3)


def test_a_split_comes_back_as_it_was(texts, corpus, tokenizer):
    records = [record["text"] for record in read_split(corpus, "train")]
    assert len(texts) == len(records) and texts.words == sum(len(text.split()) for text in records)
    for index, record in enumerate(records):
        ids, _ = texts[index]
        assert ids.dtype == torch.int64 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1]) == record and len(ids) == texts.lengths[index]


def test_a_text_that_is_cut_has_no_end(corpus, tokenizer):
    cut = Texts(corpus, "train", tokenizer, 6)
    assert max(cut.lengths) == 6 and cut[0][0][-1] != tokenizer.eos_token_id
    assert cut.words < Texts(corpus, "train", tokenizer, 128).words
    assert encode_text("", tokenizer, 6) == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_noise_is_of_the_text_and_the_epoch(texts):
    first = [texts[i][1] for i in range(len(texts))]
    texts.set_epoch(1)
    second = [texts[i][1] for i in range(len(texts))]
    assert len({*first, *second}) == 2 * len(texts) and first != [seed_of(4, 0, i) for i in range(len(texts))]
    texts.set_epoch(0)
    assert [texts[i][1] for i in range(len(texts))] == first


def test_an_epoch_has_each_text_at_most_once_in_random_order(texts):
    order = list(InRandomOrder(texts, 8))
    assert len(order) == len(set(order)) == len(InRandomOrder(texts, 8)) == len(texts) // 8 * 8
    assert order != sorted(order) and order == list(InRandomOrder(texts, 8))
    means = torch.tensor(texts.lengths)[torch.tensor(order)].view(-1, 8).float().mean(1)
    assert means.std() < torch.tensor(texts.lengths).float().std() / 2  # Batches have texts of all lengths.
    texts.set_epoch(1)
    assert order != list(InRandomOrder(texts, 8))


def test_evaluation_reads_every_text(texts, tokenizer):
    batches = list(texts.batches(8, Collator(tokenizer)))
    assert sum(len(batch["labels"]) for batch in batches) == len(texts)
    assert sum(int((batch["labels"] != IGNORED).sum()) for batch in batches) == sum(texts.lengths)


def test_a_batch_by_hand(tokenizer):
    items = [(torch.tensor([1, 10, 11, 2]), 5), (torch.tensor([1, 12, 2]), 6)]
    batch = Collator(tokenizer)(items)
    assert batch["input_ids"].tolist() == [[1, 10, 11, 2], [1, 12, 2, 0]]
    assert batch["labels"].tolist() == [[1, 10, 11, 2], [1, 12, 2, IGNORED]]
    assert batch["encoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert torch.equal(batch["encoder_input_ids"], batch["input_ids"]) and batch["seeds"].tolist() == [5, 6]
    assert set(Collator(tokenizer, encoder=False)(items)) == {"input_ids", "labels"}


def test_a_packed_batch_by_hand(tokenizer):
    items = [(torch.tensor([1, 10, 11, 2]), 5), (torch.tensor([1, 12, 2]), 6)]
    batch = Collator(tokenizer, packed=True)(items)
    assert batch["input_ids"].tolist() == batch["encoder_input_ids"].tolist() == [[1, 10, 11, 2, 1, 12, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 10, 11, 2, IGNORED, 12, 2]]
    assert batch["position_ids"].tolist() == batch["encoder_position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 7] and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["seeds"].tolist() == [5, 6] and items[0][0].tolist() == [1, 10, 11, 2]
    names = {"input_ids", "labels", "position_ids", "cu_seq_lens_q"}
    assert set(Collator(tokenizer, encoder=False, packed=True)(items)) == names
    assert set(Collator(tokenizer, packed=True).plain()(items)) == set(Collator(tokenizer)(items))


def test_augmentation_is_of_each_text_by_itself_and_leaves_labels(texts, tokenizer):
    collate = Collator(tokenizer, dropout=0.3, masking=0.3)
    items = [texts[i] for i in range(16)]
    batch, alone = collate(items), [collate([item]) for item in items]
    for row, single in enumerate(alone):
        length = len(items[row][0])
        for name in ("input_ids", "encoder_input_ids", "labels"):
            assert torch.equal(batch[name][row, :length], single[name][0]), name
        assert torch.equal(single["labels"][0], items[row][0])
    assert (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    masked = {name: float((batch[name] == tokenizer.mask_token_id).sum()) for name in ("input_ids", "encoder_input_ids")}
    tokens = sum(len(ids) for ids, _ in items)
    assert all(0.15 < count / tokens < 0.45 for count in masked.values())
    assert not torch.equal(batch["input_ids"], batch["encoder_input_ids"])
    behind = Collator(tokenizer, packed=True, dropout=0.3, masking=0.3)(items)
    for name in masked:
        rows = [row[: len(ids)] for row, (ids, _) in zip(batch[name], items)]
        assert torch.equal(behind[name][0], torch.cat(rows))
    texts.set_epoch(1)
    again = collate([texts[i] for i in range(16)])
    assert not any(torch.equal(batch[name], again[name]) for name in masked)
    plain = collate.plain()(items)
    assert all((plain[name] != tokenizer.mask_token_id).all() for name in masked)


def test_errors(texts, corpus, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"at most the number of texts, {len(texts)}; got 1000"):
        InRandomOrder(texts, 1000)
    with pytest.raises(ValueError, match="split must be one of"):
        Texts(corpus, "dev", tokenizer, 128)
    with pytest.raises(FileNotFoundError, match="is no prepared corpus"):
        Texts(tmp_path, "train", tokenizer, 128)
