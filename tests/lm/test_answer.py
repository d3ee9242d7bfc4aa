"""Answers to questions in texts: where the labels stand, which span is found, what is learned, and what is refused."""

import csv
import random
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from fastlm.cli import main
from fastlm.lm.data.read import Problems
from fastlm.lm.data.ready.questions import Question, documented_questions
from fastlm.lm.finetuning import answer as answering
from fastlm.lm.finetuning.answer import answer, best_span, find, frame_pairs, items_of, read_questions, reader_of, scores
from fastlm.lm.finetuning.common import Tuning
from fastlm.lm.finetuning.predict import predict
from fastlm.lm.model.checkpoint import load, save
from fastlm.lm.model.presets import build

NAMES = ["cat", "dog", "bird", "fish"]
PLACES = ["near the house", "under the tree", "above the river", "near a stone"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    """Save an untrained checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("vae", "decoder"):
        save(build(kind, "tiny", tokenizer), tokenizer, folder / kind)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Write questions on where an animal is: the context ends with the answer, after a word that is nowhere else."""
    draw, rows = random.Random(0), []
    for _ in range(240):
        words = draw.choices(["the", "old", "red", "small", "quick"], k=draw.randint(2, 6))
        name, place = draw.choice(NAMES), draw.choice(PLACES)
        rows.append((f"where is the {name}", f"{' '.join(words)} {name} is {place}", place))
    path = tmp_path_factory.mktemp("questions") / "places.csv"
    write(path, rows)
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory, checkpoints, places):
    output = tmp_path_factory.mktemp("reader") / "out"
    return answer(checkpoints / "vae", output, places, tuning=Tuning(epochs=6, learning_rate=5e-3)), output


@pytest.fixture
def framed(tokenizer):
    """Return a function that copies the tokenizer and frames pairs of at most so many tokens."""

    def make(most):
        copy = deepcopy(tokenizer)
        frame_pairs(copy, most)
        return copy

    return make


def write(path, rows, header=("question", "context", "answer")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def test_answers_are_learned(learned):
    result, output = learned
    assert result.exact_match > 0.8 > 0.5 > result.majority_exact_match and result.f1 >= result.exact_match
    assert f"exact match  {result.exact_match:.1%}" in str(result)
    with open(output / "predictions.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["question", "context", "answer", "predicted"] and len(rows) == result.test
    assert result.exact_match == pytest.approx(sum(wanted == found for *_, wanted, found in rows) / len(rows))


@pytest.mark.parametrize("kind", ["vae", "decoder"])
def test_transformers_alone_gives_the_same_logits(tmp_path, checkpoints, kind):
    base, tokenizer = load(checkpoints / kind)
    model = reader_of(base).eval()
    frame_pairs(tokenizer, 64)
    save(model, tokenizer, tmp_path / "out")
    stock, its = (
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    batch = {"input_ids": its("where is it", "the cat is near", return_tensors="pt")["input_ids"]}
    with torch.no_grad():
        ours, theirs = model(**batch), stock(**batch)
        hidden = (base.encoder if kind == "vae" else base.model)(**batch).last_hidden_state
    assert torch.allclose(ours.start_logits, theirs.start_logits, atol=1e-5)
    assert torch.allclose(ours.end_logits, model.qa_outputs(hidden)[..., 1], atol=1e-5), "the weights are those of the base"


def test_the_labels_stand_at_the_answer_in_every_window(framed):
    tokenizer = framed(40)
    context = " ".join(["the old tree hears a red stone"] * 8 + ["the quick fish is under the river"])
    wanted = "quick fish is"
    question = Question("what is it", context, wanted, context.index(wanted))
    items, windows = items_of([question], tokenizer), answering.windows_of(*question[:2], tokenizer)
    assert len(items) > 2 and all(len(item["input_ids"]) <= 40 for item in items)
    seen = [tokenizer.decode(item["input_ids"][item["start_positions"] : item["end_positions"] + 1]) for item in items]
    assert seen[-1].strip() == wanted and {each for each in seen[:-1]} <= {wanted, tokenizer.bos_token, f" {wanted}"}
    covered = {place for spans in windows["offset_mapping"] for span in spans for place in range(*span)}
    assert covered >= set(range(len(context))), "no part of the context is left out"
    assert items[0]["start_positions"] == items[0]["end_positions"] == 0, "the first window has no answer"


def test_a_long_question_leaves_room_for_the_context(framed):
    tokenizer = framed(40)
    items = items_of([Question("the cat sees " * 50, "a dog is here", "dog", 2)], tokenizer)
    assert len(items) == 1 and len(items[0]["input_ids"]) <= 40
    assert tokenizer.decode(items[0]["input_ids"][items[0]["start_positions"]]).strip() in ("d", "dog")


def test_the_likeliest_span_ends_after_its_start_and_is_not_too_long(monkeypatch):
    """Choose among logits whose largest sum, 9 and 9, is that of a span that ends before it starts."""
    starts, ends = torch.tensor([0.0, 7, 1, 2, 9, 50]), torch.tensor([0.0, 0, 9, 5, 2, 50])
    start, end, probability = best_span(starts, ends, [1, 2, 3, 4])  # the last is none of the context
    assert (start, end) == (1, 2)
    expected = starts[:5].softmax(0)[1] * ends[:5].softmax(0)[2]
    assert probability == pytest.approx(expected.item())
    monkeypatch.setattr(answering, "LONGEST", 1)
    assert best_span(starts, ends, [1, 2, 3, 4])[:2] == (4, 4)


class Pointer(nn.Module):
    """A model that points at each token of one id, and at the first token with a logit of 0."""

    def __init__(self, number):
        super().__init__()
        self.number, self.device = number, "cpu"

    def forward(self, input_ids, attention_mask):
        logits = (input_ids == self.number) * 20.0 - 10 * (input_ids != self.number)
        logits[:, 0] = 0
        return type("Output", (), {"start_logits": logits, "end_logits": logits})


def test_the_answer_of_the_best_window_is_found(framed):
    tokenizer = framed(32)
    (number,) = set(tokenizer(" fish")["input_ids"][1:-1][:1])
    context = "the old tree hears a red stone " * 12 + "the fish is"
    begin = tokenizer.decode([number]).strip()
    asked = [("fish fish", context), ("what", ""), ("what", "a fish")]
    texts = [text for text, _ in find(Pointer(number), tokenizer, asked)]
    assert texts == [begin, "", begin], "the question's own tokens are no answer, and no context has none"


def test_scores_are_those_of_squad():
    train = [Question("", "", "None", 0)] * 2 + [Question("", "", "a cat", 0)]
    test = [Question("", "", "the old cat", 0), Question("", "", "None", 0)]
    found = scores(train, test, ["Old cat!", "a red None"])
    assert found["exact_match"] == 0.5 and found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["majority_exact_match"] == 0.5 and found["majority_f1"] == 0.5


def test_questions_that_can_not_be_used_are_problems(tmp_path):
    rows = [("who", "a cat", "dog"), ("who", "a cat", ""), ("", "a cat", "cat"), ("who", "a cat, a cat", "cat")]
    write(tmp_path / "in.csv", rows)
    problems = Problems()
    assert list(read_questions(tmp_path / "in.csv", answering.FIELDS, problems)) == [Question("who", "a cat, a cat", "cat", 2)]
    assert problems.first == [
        f"{tmp_path}/in.csv:2: the answer is not in the context: 'dog'",
        f"{tmp_path}/in.csv:3: the answer is empty: ''",
        f"{tmp_path}/in.csv:4: the answer has no question: 'cat'",
    ]


def test_the_questions_on_the_documentation_are_answered_in_it():
    questions = list(documented_questions())
    assert len(questions) > 3000 and all(each.context[each.start :].startswith(each.answer) for each in questions)
    asked = {each.question: each.answer for each in questions}
    assert asked["What is the default of ddir in compile_dir?"] == "None"
    assert asked["What does all_tasks return?"] == "a set of all tasks for the loop"
    assert any(each.question.startswith("When does ") for each in questions)
    parts = answering.split_questions(questions, 0.1)
    contexts = [{each.context for each in part} for part in (parts.train, parts.validation, parts.test)]
    assert not (contexts[0] & contexts[1] or contexts[0] & contexts[2]) and 0.07 < len(parts.test) / len(questions) < 0.13


def test_too_few_questions_are_refused(tmp_path, checkpoints):
    write(tmp_path / "in.csv", [("who", "a cat", "dog")])
    with pytest.raises(ValueError, match="(?s)in.csv has too few questions, none for train.*is not in the context: 'dog'"):
        answer(checkpoints / "vae", tmp_path / "out", tmp_path / "in.csv")
    assert not (tmp_path / "out").exists()


def test_a_reader_answers_from_python_and_from_the_command_line(learned, tmp_path, capsys):
    _, reader = learned
    context = "the old red cat is under the tree"
    ((text, probability),) = predict(reader, ["where is the cat"], [context])
    assert text == "under the tree" and 0.5 < probability <= 1
    assert main(["lm", "predict", str(reader), "where is the cat", "--context", context]) == 0
    assert capsys.readouterr().out == f"under the tree\t{probability:.3f}\twhere is the cat\n"
    write(tmp_path / "in.csv", [("where is the cat", context, "x")])
    out = tmp_path / "out.csv"
    assert main(["lm", "predict", str(reader), "--file", str(tmp_path / "in.csv"), "--output", str(out)]) == 0
    with open(out, newline="") as file:
        assert list(csv.reader(file))[0] == ["question", "context", "predicted", "probability"]
    (tmp_path / "in.txt").write_text("where is the cat\n\nwhere is the dog\n")
    assert main(["lm", "predict", str(reader), "--file", str(tmp_path / "in.txt"), "--context", context]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["where"], "answers questions: give the --context"),
        ([], "give each TEXT, or a --file of them, and not both"),
        (["x", "--file", "in.csv"], "give each TEXT, or a --file of them, and not both"),
        (["x", "--fields", "a"], "--fields goes with --file"),
        (["--file", "gone.csv", "--fields", "a"], "--fields must be 2 names, as question context; got a"),
        (["--file", "gone.csv"], "gone.csv: no such file"),
        (["--file", "gone.txt"], "has a question on each line: give the --context"),
    ],
)
def test_predictions_that_are_refused(learned, capsys, arguments, message):
    assert main(["lm", "predict", str(learned[1]), *arguments]) == 1
    assert message in capsys.readouterr().err
