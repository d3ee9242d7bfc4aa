"""The vocabularies of fastlm.lm: a byte-level BPE for any text, and a vocabulary of words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastlm.lm.data.tokenizer import SPECIAL, UNKNOWN, load_tokenizer, train_bpe, train_words

CHINESE = ["今天天气很好，我们去公园散步。", "他说：“你好，世界！”", "语言模型从文本中学习。"]
ENGLISH = ["The cat sat on the mat.", "The dog sat on the log.", "A model learns from the text that it reads."]
CORPUS = (CHINESE + ENGLISH) * 3


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(iter(CORPUS), 300).save(str(path))
    return load_tokenizer(path)


@pytest.mark.parametrize(
    "text", [*CORPUS[:6], "繁體字，沒見過。", "naïve Größe", "नमस्ते", "👩‍👩‍👧 emoji", "  two  \n\n\tblanks ", ""]
)
def test_round_trips(bpe, text):
    assert bpe.decode(bpe(text)["input_ids"]) == text


@given(st.text())
def test_any_text_round_trips(bpe, text):
    ids = bpe(text)["input_ids"]
    assert bpe.decode(ids) == text and max(ids, default=0) < 300 and min(ids, default=9) >= len(SPECIAL)


def test_training_merges_what_is_frequent(bpe):
    assert len(bpe("The cat sat")["input_ids"]) < len("The cat sat")
    assert len(bpe("语言模型")["input_ids"]) < len("语言模型".encode())


def test_special_tokens(bpe):
    assert [bpe.pad_token_id, bpe.bos_token_id, bpe.eos_token_id, bpe.mask_token_id] == [0, 1, 2, 3]
    padded = bpe(["The cat", "The cat sat on the mat"], padding=True)
    assert padded["input_ids"][0][-1] == 0 and padded["attention_mask"][0][-1] == 0
    ids = [1, *bpe("The cat")["input_ids"], 2]
    assert bpe.decode(ids, skip_special_tokens=True) == "The cat"


def test_transformers_saves_and_loads_it(bpe, tmp_path):
    from transformers import PreTrainedTokenizerFast

    bpe.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(CHINESE[0])["input_ids"] == bpe(CHINESE[0])["input_ids"] and again.mask_token_id == 3


def test_the_same_corpus_gives_the_same_vocabulary():
    assert train_bpe(CORPUS, 300).to_str() == train_bpe(iter(CORPUS), 300).to_str()
    assert train_words(CORPUS, 30).to_str() == train_words(iter(CORPUS), 30).to_str()


def test_words(tmp_path):
    tokenizer = train_words(CORPUS, 30)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.unk_token == UNKNOWN and loaded.unk_token_id == 4
    assert loaded.convert_ids_to_tokens(loaded("The zebra sat.")["input_ids"]) == ["The", UNKNOWN, "sat", "."]
    vocabulary = train_words(CORPUS, 54).get_vocab()
    assert {"天", "”", "！"} <= set(vocabulary) and "天气" not in vocabulary and sorted(vocabulary.values()) == list(range(54))
    lowered = train_words(CORPUS, 30, lowercase=True).get_vocab()
    assert "the" in lowered and "The" not in lowered


@pytest.mark.parametrize("train", [train_bpe, train_words])
def test_a_corpus_too_small_for_its_vocabulary_gives_what_it_has(train):
    found = train(CORPUS, 5000)
    assert 50 < found.get_vocab_size() < 400 and found.to_str() == train(CORPUS, found.get_vocab_size()).to_str()
    with pytest.raises(ValueError, match="vocab_size must be a.*got 5"):
        train(CORPUS, 5)


@pytest.mark.parametrize("text", ["<|eos|>", "a <|bos|> and <|pad|>", "<|mask|><|mask|>"])
def test_special_tokens_in_a_text_are_text(bpe, text, tmp_path):
    """They are text for plain transformers, too, in the folder that is saved."""
    bpe.save_pretrained(tmp_path)
    for tokenizer in (bpe, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(text)["input_ids"]
        assert min(ids) > 3 and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such tokenizer"):
        load_tokenizer(tmp_path)
    text = train_bpe(CORPUS, 300).to_str()
    for content, message in [("", "is no tokenizer, or damaged"), (text[:-100], "is no tokenizer, or damaged")]:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.replace("<|mask|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"is no tokenizer of fastlm\.lm: it lacks <\|mask\|>"):
        load_tokenizer(tmp_path)
