"""Word vectors of word2vec and GloVe files become an embedding; damaged files are refused, and named."""

import gzip

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlm.lm.data.tokenizer import train_words
from fastlm.lm.data.word_vectors import MAX_WORD, embedding_from_vectors, neighbours, read_vectors

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=8)
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def floats(*values):
    return np.array(values, dtype="<f4").tobytes()


def as_text(vectors, header=True):
    lines = [f"{word} {' '.join(repr(float(x)) for x in vector)}" for word, vector in vectors]
    return "\n".join([f"{len(vectors)} {len(vectors[0][1])}"] * header + lines).encode() + b"\n"


def as_binary(vectors, end=b"\n"):
    head = f"{len(vectors)} {len(vectors[0][1])}\n".encode()
    return head + b"".join(word.encode() + b" " + floats(*vector) + end for word, vector in vectors)


def read(tmp_path, content, **options):
    path = tmp_path / "vectors"
    path.write_bytes(content)
    return list(read_vectors(path, **options))


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.tuples(WORDS, st.lists(NUMBERS, min_size=n, max_size=n)), min_size=1)))
def test_every_format_round_trips(tmp_path, vectors):
    """Formats are given by name, as a binary file may look like text, and GloVe's format forbids a first line like a header."""
    contents = [(as_text(vectors), False), (as_binary(vectors), True), (as_binary(vectors, end=b""), True)]
    if not vectors[0][0].isdigit():
        contents.append((as_text(vectors, header=False), False))
    for content, binary in contents:
        found = read(tmp_path, content, binary=binary)
        assert [word for word, _ in found] == [word for word, _ in vectors]
        assert all(np.array_equal(mine, np.float32(given)) for (_, mine), (_, given) in zip(found, vectors))


@pytest.mark.parametrize("write", [as_text, as_binary, lambda vectors: as_text(vectors, header=False)])
def test_the_format_is_told_by_the_beginning(tmp_path, write):
    rng = np.random.default_rng(0)
    vectors = [(word, rng.standard_normal(50, dtype=np.float32)) for word in ("the", "of", "语言", "naïve")]
    found = read(tmp_path, write(vectors))
    assert [word for word, _ in found] == ["the", "of", "语言", "naïve"]
    assert all(np.array_equal(mine, given) for (_, mine), (_, given) in zip(found, vectors))


def test_words_with_blanks_in_them(tmp_path):
    """The file of GloVe's 840B has words with blanks."""
    assert [word for word, _ in read(tmp_path, b"a 1 2\n. . . 3 4\nat name@host 5 6\n\n")] == ["a", ". . .", "at name@host"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is cut short or empty: 0 vectors, and the header says nothing"),
        (b"2 2\na x 2\nb 3 4\n", "line 2: could not convert string to float"),
        (b"2 2\na 1 2\nb 3\n", "line 3: expected a word and 2 numbers; got 1"),
        (b"2 2\na 1 2\nb 3 4 5\n", "line 3: expected a word and 2 numbers; got 3"),
        (b"a 1 2\nb 3\n", "line 2: expected a word and 2 numbers; got 1"),
        (b"a 1 2\nb 3 4 5\n", "line 2: expected a word and 2 numbers; got 3"),
        (b"a 1 2\nb 3 x\n", "line 2: could not convert string to float"),
        (b"a 1 2\nb 3 nan\n", "line 2: a number is not finite"),
        (b"3 2\na 1 2\nb 3 4\n", "cut short or empty: 2 vectors, and the header says 3"),
        (b"1 2\na 1 2\nb 3 4\n", "line 3: the header says 1 vectors, and more follow"),
        (b"2 2\na 1 2\n\xff 3 4\n", r"line 3: the word b'\\xff' is not UTF-8"),
        (b"0 2\n", "a header of 0 vectors of 2 numbers"),
        (b"2 99999\na 1\n", "a header of 2 vectors of 99999 numbers"),
        (b"hello\n", "line 1: expected a word and 1 numbers; got 0"),
        (b"a 1 2\n 3 4\n", "line 2: the word is missing"),
        (as_binary([("a", [1, 2]), ("b", [3, 4])])[:-4], "is cut short|vector 2 of 2: the file is cut short"),
        (b"900000000000 16000\na " + floats(1, 2), "is cut short: its header says 900000000000 vectors"),
        (as_binary([("a", [1, 2]), ("b", [3, np.inf])]), "vector 2 of 2: a number is not finite"),
        (as_binary([("a", [1, 2])] * 3).replace(b"3 2", b"2 2"), "the header says 2 vectors, and more follow"),
        (b"1 2\n" + b"\x01" * (MAX_WORD + 10), f"vector 1 of 1: no word ends within {MAX_WORD} bytes"),
        (b"1 2\n\xff\xfe " + floats(1, 2), "vector 1 of 1: the word .* is not UTF-8"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, content)
    assert str(tmp_path / "vectors") in str(error.value)


@given(st.integers(0, 10_000))
def test_a_binary_file_cut_anywhere_is_refused(tmp_path, cut):
    content = as_binary([(f"word{i}", [i, 1, 2]) for i in range(20)], end=b"")
    with pytest.raises(ValueError, match="vectors"):
        read(tmp_path, content[: cut % len(content)], binary=True)


@pytest.mark.parametrize("write", [as_text, as_binary, lambda vectors: as_text(vectors, header=False)])
def test_gzipped_files_and_byte_order_marks(tmp_path, write):
    vectors = [("the", [1.0, 2.0]), ("语言", [3.0, 4.0])]
    content = write(vectors)
    for changed in (gzip.compress(content), b"\xef\xbb\xbf" + content, gzip.compress(b"\xef\xbb\xbf" + content)):
        assert [(word, list(vector)) for word, vector in read(tmp_path, changed)] == vectors
    with pytest.raises(ValueError, match="vectors is damaged or cut short"):
        read(tmp_path, gzip.compress(content)[:-6])


def test_words_in_another_encoding_name_the_way_out(tmp_path):
    content = "2 2\n我们 1 2\n语言 3 4\n".encode("gb18030")
    with pytest.raises(
        ValueError, match="line 2: the word .* is not UTF-8; convert the file to UTF-8: iconv -f gb18030 -t utf-8"
    ):
        read(tmp_path, content)


def test_missing_and_misnamed_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file of word vectors"):
        list(read_vectors(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is no binary word2vec file"):
        read(tmp_path, b"a 1 2\n", binary=True)


# ---- the embedding ----------------------------------------------------------------------------------------------------------

VOCABULARY = {"<|pad|>": 0, "cat": 1, "Cat": 2, "CAT": 3, "dog": 4, "unheard": 5}
FILE = as_text([("Cat", [9, 9]), ("cat", [1, 2]), ("dog", [3, 5]), ("cat", [7, 7]), ("zebra", [100, 100])])


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "vectors"
    path.write_bytes(FILE)
    return path


def test_words_take_their_vectors(vectors):
    embedding, found = embedding_from_vectors(vectors, VOCABULARY, padding="<|pad|>")
    assert found == 4 and embedding.weight.dtype == torch.float32
    expected = torch.tensor([[0, 0], [1, 2], [9, 9], [1, 2], [3, 5]], dtype=torch.float32)
    assert torch.equal(embedding.weight[:5], expected), "own spelling first, then lower case, then the first of two"
    assert torch.isfinite(embedding.weight).all() and embedding.padding_idx == 0


def test_unheard_words_are_drawn_like_the_others_and_reproduced(tmp_path):
    rng = np.random.default_rng(1)
    known = [(f"w{i}", rng.normal(5, 0.5, 20)) for i in range(400)]
    path = tmp_path / "vectors"
    path.write_bytes(as_binary(known))
    vocabulary = {f"w{i}": i for i in range(800)}
    draw = lambda seed: embedding_from_vectors(path, vocabulary, seed=seed).embedding.weight.detach()  # noqa: E731
    unheard = draw(0)[400:]
    assert abs(unheard.mean() - 5) < 0.05 and abs(unheard.std() - 0.5) < 0.05 and unheard.unique(dim=0).shape == (400, 20)
    assert torch.equal(draw(0), draw(0)) and torch.equal(draw(0)[:400], draw(1)[:400]) and not torch.equal(draw(0), draw(1))


def test_frozen_or_not(vectors):
    for freeze in (False, True):
        embedding = embedding_from_vectors(vectors, VOCABULARY, freeze=freeze).embedding
        before = embedding.weight.detach().clone()
        head = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD([p for p in (*embedding.parameters(), *head.parameters()) if p.requires_grad], lr=1.0)
        head(embedding(torch.tensor([1, 4]))).sum().backward()
        optimizer.step()
        assert torch.equal(before, embedding.weight) == freeze


def test_with_a_vocabulary_of_words(vectors):
    tokenizer = train_words(["the cat and the dog", "the cat and the dog"], 9)
    vocabulary = tokenizer.get_vocab()
    embedding, found = embedding_from_vectors(vectors, vocabulary, width=2)
    assert found == 2 and torch.equal(embedding.weight[tokenizer.token_to_id("dog")], torch.tensor([3.0, 5.0]))


def test_embeddings_that_cannot_be(vectors):
    for options, message in [
        ({"width": 3}, f"width is 3, and the vectors of {vectors} have 2 numbers"),
        ({"vocabulary": {"qua": 0}}, "has a vector for none of the 1 tokens"),
        ({"vocabulary": {"cat": 1}}, "vocabulary must give each token an id, from 0 without gaps"),
        ({"vocabulary": {}}, "vocabulary must give each token an id"),
        ({"padding": "<pad>"}, "padding must be a token of the vocabulary; got '<pad>'"),
    ]:
        with pytest.raises(ValueError, match=message):
            embedding_from_vectors(vectors, **{"vocabulary": VOCABULARY, **options})


def test_neighbours():
    vocabulary = {"a": 0, "b": 1, "c": 2, "d": 3}
    weight = torch.tensor([[1.0, 0.0], [2.0, 2.0], [5.0, 0.1], [-1.0, 0.0]], requires_grad=True)
    found = neighbours(weight, vocabulary, "a", 2)
    assert [word for word, _ in found] == ["c", "b"] and found[1][1] == pytest.approx(0.5**0.5)
    assert [word for word, _ in neighbours(weight, vocabulary, "a")] == ["c", "b", "d"]
    with pytest.raises(ValueError, match="word must be a token of the vocabulary; got 'z'"):
        neighbours(weight, vocabulary, "z")
    with pytest.raises(ValueError, match=r"embedding must be \(4, width\), a row a token; got \(3, 2\)"):
        neighbours(weight[:3], vocabulary, "a")
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        neighbours(weight, vocabulary, "a", 0)
