"""Fine-tuning: stock models with a checkpoint's weights, the weights that LoRA trains, predictions, and refused input."""

import argparse
import csv
import json
import random

import pytest
import sacrebleu
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import fastlm.lm.finetuning.common as shared
from fastlm.cli import main
from fastlm.lm.cli.finetune import add_finetune
from fastlm.lm.data.batches import encode_text
from fastlm.lm.data.prepare import prepare
from fastlm.lm.data.tokenizer import load_tokenizer
from fastlm.lm.finetuning import classify as classification
from fastlm.lm.finetuning import translate as translation
from fastlm.lm.finetuning.classify import classifier_of, classify, write_confusion
from fastlm.lm.finetuning.common import Examples, Tuning, adapted, fit, frame, read_examples
from fastlm.lm.finetuning.translate import decoder_of, generate, translate
from fastlm.lm.model.checkpoint import load, save
from fastlm.lm.model.generate import TextGenerator
from fastlm.lm.model.presets import build
from fastlm.lm.training.trainer import Interrupted

SEA = ["wave", "harbour", "salt", "sail", "tide", "anchor"]
ROOM = ["lamp", "carpet", "shelf", "door", "curtain", "chair"]
COMMON = ["the", "an", "old", "near", "with", "under", "some"]


def about(words, draw):
    return " ".join(draw.choices(words, k=4) + draw.choices(COMMON, k=6))


@pytest.fixture(scope="module")
def topics():
    """Return (text, label) pairs whose words determine the label; two thirds have the first label."""
    draw = random.Random(0)
    rows = [(about(SEA, draw), "sea") for _ in range(200)] + [(about(ROOM, draw), "room") for _ in range(100)]
    draw.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def pairs():
    """Return (source, target) pairs, where the target names the kind of the source's one informative word."""
    draw = random.Random(1)
    kinds = [(word, "one finds it on water") for word in SEA] + [(word, "one has it at home") for word in ROOM]
    rows = [(f"{' '.join(draw.choices(COMMON, k=draw.randint(1, 6)))} {word}", kind) for word, kind in kinds * 20]
    draw.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, topics):
    """Prepare texts with labels; each has a first line, an empty line and a rest."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = [(f"About {label} things.\n\n{text} and more of that", label) for text, label in topics]
    write(folder / "texts.csv", ("text", "label"), rows)
    prepare([folder / "texts.csv"], folder / "corpus", validation=0.15, test=0.15, vocab_size=320, similarity=1.0)
    return folder / "corpus"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, corpus):
    """Save an untrained checkpoint of each kind."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer(corpus)
    for kind in ("vae", "decoder"):
        save(build(kind, "tiny", tokenizer), tokenizer, folder / kind)
    return folder


def write(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# ---- classification ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classified(tmp_path_factory, checkpoints, topics):
    folder = tmp_path_factory.mktemp("classified")
    write(folder / "topics.csv", ("text", "label"), topics)
    tuning = Tuning(epochs=4, learning_rate=2e-3)
    return classify(checkpoints / "vae", folder / "output", folder / "topics.csv", tuning=tuning), folder / "output"


def test_a_separable_task_is_learned(classified):
    result, _ = classified
    assert result.labels == ["room", "sea"] and result.train + result.validation + result.test == 300
    assert result.accuracy > 0.95 and 0.5 < result.majority < 0.8


def test_the_metrics_are_those_of_the_predictions(classified, topics):
    result, output = classified
    header, *rows = table(output / "predictions.csv")
    assert header == ["text", "label", "predicted"] and len(rows) == result.test
    assert {(text, label) for text, label, _ in rows} <= set(topics)
    assert result.accuracy == sum(label == predicted for _, label, predicted in rows) / len(rows)
    assert result.majority == sum(label == "sea" for _, label, _ in rows) / len(rows)
    assert json.loads((output / "metrics.json").read_text())["accuracy"] == result.accuracy
    assert f"accuracy  {result.accuracy:.1%}" in str(result) and f"{result.majority:.1%}" in str(result)
    assert not [path for path in output.iterdir() if path.is_dir()], "nothing of the training is left"


def test_transformers_pipeline_predicts_the_same(classified):
    """Hold the saved tokenizer to the special tokens of training, by what a pipeline predicts with it."""
    _, output = classified
    _, *rows = table(output / "predictions.csv")
    found = pipeline("text-classification", str(output), device="cpu")([text for text, _, _ in rows])
    assert [one["label"] for one in found] == [predicted for _, _, predicted in rows]
    config = AutoModelForSequenceClassification.from_pretrained(output).config
    assert config.label2id == {"room": 0, "sea": 1} and config.model_type == "eurobert"


def test_accuracy_majority_and_macro_f1_by_hand():
    """Label a has precision 2/3 and recall 2/2, b has 1/1 and 1/2, and c is never predicted."""
    wanted, found = ["a", "a", "b", "b", "c"], ["a", "a", "b", "a", "b"]
    examples = Examples([("", "b"), ("", "b"), ("", "a"), ("", "c")], [], [("", label) for label in wanted])
    assert classification.scores(examples, found) == pytest.approx(
        {"accuracy": 3 / 5, "majority": 2 / 5, "macro_f1": (4 / 5 + 1 / 2 + 0) / 3}
    )


def test_a_text_vae_gives_its_encoder(checkpoints):
    vae, tokenizer = load(checkpoints / "vae")
    model = classifier_of(vae, ["a", "b"]).eval()
    texts = [torch.tensor(encode_text(text, tokenizer, 99)) for text in ("a lamp near the door", "salt")]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = (ids != 0).long()
    pooled = []
    model.dense.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        assert torch.allclose(pooled[0], vae.encode(ids, mask), rtol=1e-6, atol=1e-6)
        assert torch.equal(model.model(ids[:1]).last_hidden_state, vae.encoder(ids[:1]).last_hidden_state)


def test_a_decoder_gives_itself(checkpoints):
    decoder, _ = load(checkpoints / "decoder")
    model = classifier_of(decoder, ["a", "b", "c"]).eval()
    ids = torch.tensor([[1, 50, 60, 2], [1, 70, 2, 0]])
    with torch.no_grad():
        last = decoder.model(ids).last_hidden_state[[0, 1], [3, 2]]  # at <|eos|>
        assert torch.allclose(model(ids).logits, last @ model.score.weight.T, atol=1e-6)


def test_the_corpus_is_the_default(tmp_path, checkpoints, corpus):
    result = classify(checkpoints / "decoder", tmp_path / "out", corpus=corpus, tuning=Tuning(epochs=0.5, lora=2))
    assert result.labels == ["room", "sea"]
    report = json.loads((corpus / "report.json").read_text())["splits"]
    assert [result.train, result.validation, result.test] == [split["records"] for split in report.values()]
    assert classification.corpus_examples(corpus, 1).counts["train"] < result.train


def test_the_confusion_matrix_is_a_picture(tmp_path):
    labels = ["short", "a label of many more characters than there is room for"]
    write_confusion(labels, labels[:1] * 2, labels, tmp_path / "small.png")
    write_confusion(labels, labels, labels + [str(number) for number in range(30)], tmp_path / "large.png")
    small, large = (imread(tmp_path / name) for name in ("small.png", "large.png"))
    assert large.shape[0] > 2 * small.shape[0] and small.std() > 0.05


# ---- from text to text ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translated(tmp_path_factory, checkpoints, pairs):
    folder = tmp_path_factory.mktemp("translated")
    lines = [json.dumps({"question": source, "answer": target}) for source, target in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    tuning = Tuning(epochs=8, learning_rate=5e-3)
    options = {"fields": ("question", "answer"), "tuning": tuning}
    return translate(checkpoints / "vae", folder / "output", folder / "pairs.jsonl", **options), folder / "output"


def test_a_simple_translation_is_learned(translated):
    result, output = translated
    assert result.exact > 0.7 and result.bleu > 50
    assert "tok:13a" in str(result) and f"chrF         {result.chrf:.2f}" in str(result) and result.chrf > 50


def test_bleu_is_sacrebleus(translated):
    result, output = translated
    header, *rows = table(output / "predictions.csv")
    assert header == ["source", "target", "predicted"] and len(rows) == result.test
    _, targets, predicted = map(list, zip(*rows))
    assert result.bleu == pytest.approx(sacrebleu.corpus_bleu(predicted, [targets]).score, rel=1e-12)
    assert result.chrf == pytest.approx(sacrebleu.corpus_chrf(predicted, [targets]).score, rel=1e-12)
    assert result.exact == sum(map(str.__eq__, targets, predicted)) / len(rows)


def test_transformers_alone_generates_the_same(translated):
    """Generate from one source at a time, without padding, on torch's own attention."""
    _, output = translated
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    for source, _, predicted in table(output / "predictions.csv")[1:6]:
        ids = tokenizer(source, return_tensors="pt")["input_ids"]
        made = model.generate(ids, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(made, skip_special_tokens=True).strip() == predicted


def test_the_text_generator_gives_the_target_alone(translated):
    """It gives the prediction of the test, also in pieces, without its source, and asks for one; it draws where told to."""
    _, output = translated
    rows = table(output / "predictions.csv")[1:6]
    generator = TextGenerator(*load(output))
    assert generator.sample(prompt=[source for source, _, _ in rows]) == [predicted for _, _, predicted in rows]
    assert "".join(generator.stream(rows[0][0])).strip() == rows[0][2]
    assert len(set(generator.sample(20, prompt=rows[0][0], temperature=3.0, top_p=1.0))) > 1
    with pytest.raises(ValueError, match="goes from a source to a target: give it the source as the prompt"):
        generator.sample()
    with pytest.raises(ValueError, match="a prompt must have at most 125 tokens"):
        generator.sample(prompt="wave " * 200)


def test_the_command_generate_translates(translated, capsys):
    _, output = translated
    source, _, predicted = table(output / "predictions.csv")[1]
    assert main(["lm", "generate", str(output), source]) == 0
    assert capsys.readouterr().out == f"{predicted}\n"


@pytest.mark.parametrize(
    ("targets", "tokenizer"),
    [
        (["今天天气很好，我们去公园散步。", "他说：“你好，世界！”"], "zh"),
        (["今日は天気がいいので、公園を散歩しました。"], "char"),
        (["วันนี้อากาศดี"], "char"),
        (["The weather is fine today.", "He visited 北京 once, and went home by train."], "13a"),
        (["오늘은 날씨가 좋습니다."], "13a"),
    ],
)
def test_a_perfect_translation_has_a_score_of_100_in_every_language(targets, tokenizer):
    found = translation.scores(targets, targets)
    assert found["bleu"] == pytest.approx(100) and found["chrf"] == pytest.approx(100)
    assert f"tok:{tokenizer}" in found["signature"] and found["chrf_signature"].startswith("nrefs:1")


def test_the_source_is_no_label(checkpoints):
    _, tokenizer = load(checkpoints / "decoder")
    frame(tokenizer, tokenizer.bos_token, 6)
    plain = lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    a, b, long = plain("the sea"), plain("door"), plain("the lamp near the old door")
    assert len(a) < 4 < len(long)
    items = translation.items_of([("the sea", "door"), ("the lamp near the old door", "the sea")], tokenizer, 9)
    assert items[0] == {"input_ids": [1, *a, 1, *b, 2][:9], "labels": ([-100] * (len(a) + 2) + [*b, 2])[:9]}
    assert items[1]["input_ids"] == [1, *long[:4], 1, *[*a, 2][:3]] and items[1]["labels"] == [-100] * 6 + [*a, 2][:3]


def test_what_is_generated_depends_on_no_other_source(checkpoints):
    model, tokenizer = load(checkpoints / "decoder")
    frame(tokenizer, tokenizer.bos_token, 64)
    tokenizer.padding_side = "left"
    with torch.no_grad():  # large weights, so that attention decides and rounding does not
        for name, weight in model.model.layers.named_parameters():
            weight *= 10 if "_proj" in name else 1
    model.generation_config.max_new_tokens = 5
    sources = ["the old lamp near the door with some salt", "salt", "a tide"]
    assert generate(model, tokenizer, sources) == [generate(model, tokenizer, [source])[0] for source in sources]


def test_the_seed_decides(tmp_path, checkpoints, corpus):
    def weights(seed, name):
        translate(checkpoints / "decoder", tmp_path / name, corpus=corpus, tuning=Tuning(epochs=0.2, lora=2, seed=seed))
        return load(tmp_path / name)[0].state_dict()

    first, again, other = weights(0, "first"), weights(0, "again"), weights(1, "other")
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not all(torch.equal(other[name], value) for name, value in first.items())


def test_summaries_of_the_corpus():
    texts = [(0, "Do it.\n\nNow,\n\nthen"), (0, "A later window.\n\nRest"), (1, "Do it."), (2, "Do\nit.\n\nNow"), (3, "A\n\nB")]
    records = [{"document": document, "text": text} for document, text in texts]
    assert list(translation.summaries(records)) == [("Now,\n\nthen", "Do it."), ("B", "A")]


def test_the_decoder_of_a_text_vae(checkpoints):
    vae, _ = load(checkpoints / "vae")
    ids = torch.tensor([[1, 50, 60, 2]])
    with torch.no_grad():
        assert torch.equal(decoder_of(vae)(ids).logits, vae.decoder(ids).logits)


# ---- LoRA -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vae", "decoder"])
def test_lora_trains_its_matrices_and_the_head(tmp_path, checkpoints, kind):
    base, tokenizer = load(checkpoints / kind)
    model = classifier_of(base, ["a", "b"])
    heads = classification.HEADS[type(model)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = adapted(model, 2, heads)
    frame(tokenizer, tokenizer.eos_token, 32)
    items = classification.items_of([("salt", "a"), ("door", "b")] * 4, tokenizer, ["a", "b"])
    collate = classification.DataCollatorWithPadding(tokenizer)
    fit(lora, Tuning(epochs=2, batch_size=4, learning_rate=1e-2), items, items, collate, tmp_path / "epochs")

    batch = {name: value for name, value in collate(items[:2]).items() if name != "labels"}
    with torch.no_grad():
        through_adapter = lora(**batch).logits
        frozen = {name.removeprefix("base_model.model."): value.clone() for name, value in lora.state_dict().items()}
        merged = lora.merge_and_unload()
        assert torch.allclose(merged(**batch).logits, through_adapter, atol=1e-5)
    assert {name.replace(".base_layer", "") for name in frozen if ".base_layer" in name} == {
        name for name in before if name.split(".")[-2].endswith("_proj")
    }
    for name, value in frozen.items():
        if name.replace(".base_layer", "") in before:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), f"{name} is frozen"
    after = merged.state_dict()
    assert after.keys() == before.keys() and type(merged) is type(model)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert {f"{head}.weight" for head in heads} <= changed
    assert all("_proj." in name or name.split(".")[0] in heads for name in changed), "no embedding and no norm"


def test_lora_leaves_a_stock_checkpoint(tmp_path, checkpoints, pairs):
    write(tmp_path / "pairs.csv", ("source", "target"), pairs[:60])
    translate(checkpoints / "decoder", tmp_path / "out", tmp_path / "pairs.csv", tuning=Tuning(epochs=0.5, lora=2))
    before, (after, _) = load(checkpoints / "decoder")[0].state_dict(), load(tmp_path / "out")
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("_proj." in name for name in changed) and after.state_dict().keys() == before.keys()


# ---- the examples, and what is refused --------------------------------------------------------------------------------------


def test_malformed_rows_are_counted_and_the_rest_is_read(tmp_path):
    good = [json.dumps({"text": f"text number {number}", "label": number % 2}) for number in range(60)]
    bad = ["{", '{"text": 3, "label": "a"}', '{"text": "x"}', '{"text": " ", "label": "a"}', "[]", "null"]
    (tmp_path / "in.jsonl").write_text("\n".join([*bad, *good, good[0], good[0].upper().replace('TEXT"', 'text"')]))
    examples = read_examples(tmp_path / "in.jsonl", ("text", "label"))
    assert examples.problems.count == 7 and len(examples.problems.first) == 5
    assert examples.problems.first[2] == f"{tmp_path}/in.jsonl:3: the field 'label' is missing or empty"
    assert sum(examples.counts.values()) == 61 and {label for _, label in examples.train} == {"0", "1"}
    parts = [{text for text, _ in getattr(examples, split)} for split in ("train", "validation", "test")]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert "unreadable  7 rows" in shared.problem_lines(examples.problems)


def test_a_file_of_its_own_to_test_on(tmp_path, topics):
    data, test = (
        write(tmp_path / f"{name}.csv", ("a", "b"), rows) for name, rows in (("x", topics[:90]), ("y", topics[90:95]))
    )
    examples = read_examples(data, ("a", "b"), test)
    assert examples.test == topics[90:95] and sorted(examples.train + examples.validation) == sorted(topics[:90])


def refused(tmp_path, checkpoints, error, message, rows=(), function=classify, **options):
    data = write(tmp_path / "in.csv", ("text", "label"), rows)
    with pytest.raises(error, match=message):
        function(checkpoints / "vae", tmp_path / "out", data, **options)
    assert not (tmp_path / "out").exists(), "nothing was written"


def test_examples_that_are_refused(tmp_path, checkpoints, topics):
    refused(tmp_path, checkpoints, ValueError, "in.csv has too few examples, none for train")
    refused(tmp_path, checkpoints, ValueError, r"in.csv has too few examples, none for \w+ \(train", [("seen", "a")])
    same = [(text, "sea") for text, _ in topics]
    refused(tmp_path, checkpoints, ValueError, "in.csv has one label only, 'sea'; at least 2 are needed", same)
    test = write(tmp_path / "test.csv", ("text", "label"), [("x", "sky")])
    message = "test texts have labels that no text to train on has: 'sky'"
    refused(tmp_path, checkpoints, ValueError, message, topics, test=test)
    refused(tmp_path, checkpoints, ValueError, "in.csv has no column 'review'", topics, fields=("review", "label"))
    (tmp_path / "empty.csv").touch()
    refused(tmp_path, checkpoints, ValueError, "empty.csv is empty", topics, test=tmp_path / "empty.csv")
    refused(tmp_path, checkpoints, FileNotFoundError, "gone.csv: no such file", topics, test=tmp_path / "gone.csv")
    refused(tmp_path, checkpoints, ValueError, "in.csv has no column 'source'", topics, function=translate)


def test_checkpoints_and_folders_that_are_refused(tmp_path, checkpoints, corpus, topics):
    data = write(tmp_path / "in.csv", ("text", "label"), topics)
    for function in (classify, translate):
        with pytest.raises(ValueError, match=f"output must be a new folder; {checkpoints / 'vae'} holds another checkpoint"):
            function(checkpoints / "vae", checkpoints / "vae", data)
        with pytest.raises(ValueError, match=f"output must be a folder; {data} is a file"):
            function(checkpoints / "vae", data, data)
        with pytest.raises(FileNotFoundError, match="nowhere is no checkpoint"):
            function(tmp_path / "nowhere", tmp_path / "out", corpus=corpus)
        with pytest.raises(FileNotFoundError, match="nowhere is no prepared corpus"):
            function(checkpoints / "vae", tmp_path / "out", corpus=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_labels(tmp_path, checkpoints):
    (tmp_path / "in.txt").write_text("\n\n".join(f"A text of the number {number} and no label" for number in range(40)))
    prepare([tmp_path / "in.txt"], tmp_path / "corpus", vocab_size=0, similarity=1.0)
    with pytest.raises(ValueError, match="corpus has 0 labels, and at least 2 are needed: give a file"):
        classify(checkpoints / "vae", tmp_path / "out", corpus=tmp_path / "corpus")


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 0), ("batch_size", 0), ("learning_rate", -1.0), ("lora", -1), ("seed", -1)]
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*; got {value}"):
        Tuning(**{name: value})


def test_a_failure_leaves_no_checkpoint(tmp_path, checkpoints, corpus, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(shared, "save", full)
    with pytest.raises(OSError, match="No space left"):
        translate(checkpoints / "decoder", tmp_path / "out", corpus=corpus, tuning=Tuning(epochs=0.1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"], "which is there to go on with"
    with pytest.raises(ValueError, match="output must be a new folder; .*out holds a run to go on with: --resume"):
        translate(checkpoints / "decoder", tmp_path / "out", corpus=corpus, tuning=Tuning(epochs=0.1))
    monkeypatch.undo()
    translate(checkpoints / "decoder", tmp_path / "out", corpus=corpus, tuning=Tuning(epochs=0.1), resume=True)
    assert load(tmp_path / "out") and not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("task", [classify, translate])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, checkpoints, corpus, monkeypatch, task, lora):
    """It is interrupted in its second epoch of three, and goes on from the end of the first."""
    tuning = Tuning(epochs=3, lora=lora)
    whole, run, steps, step_end = tmp_path / "whole", tmp_path / "run", [], shared.Epochs.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        steps.append(state.global_step)
        if state.epoch > 1.3:
            raise KeyboardInterrupt

    task(checkpoints / "vae", whole, corpus=corpus, tuning=tuning)
    monkeypatch.setattr(shared.Epochs, "on_step_end", interrupt)
    with pytest.raises(Interrupted, match=f"a checkpoint is in {run}/checkpoints/checkpoint-"):
        task(checkpoints / "vae", run, corpus=corpus, tuning=tuning)
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    for wrong, message in ((Tuning(epochs=3, lora=lora, seed=1), "another seed"), (Tuning(lora=lora), "another epochs")):
        with pytest.raises(ValueError, match=f"a run is resumed with its own settings and examples; {run} has {message}"):
            task(checkpoints / "vae", run, corpus=corpus, tuning=wrong, resume=True)
    monkeypatch.undo()
    task(checkpoints / "vae", run, corpus=corpus, tuning=tuning, resume=True)
    for name in ("model.safetensors", "metrics.json", "predictions.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_there_must_be_a_run_to_resume(tmp_path, checkpoints, corpus):
    with pytest.raises(FileNotFoundError, match="out holds no run to resume"):
        translate(checkpoints / "decoder", tmp_path / "out", corpus=corpus, resume=True)
    assert not (tmp_path / "out").exists()


# ---- the command line -------------------------------------------------------------------------------------------------------


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_finetune(parser.add_subparsers(dest="command"))
    parsed = parser.parse_args(["finetune", *map(str, arguments)])
    parsed.run(parsed)


def test_the_command_line(tmp_path, checkpoints, topics, capsys):
    data = write(tmp_path / "in.csv", ("review", "stars"), topics)
    options = ["--fields", "review", "stars", "--epochs", 0.2, "--batch-size", 8, "--lora", 2, "--output", tmp_path / "out"]
    run(checkpoints / "decoder", "classify", data, *options)
    out = capsys.readouterr().out
    assert "macro F1" in out and f"The model is in {tmp_path / 'out'}" in out
    assert {"confusion.png", "metrics.json", "predictions.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_help_tells_the_options(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "{classify,translate,answer,speech}",
        "CHECKPOINT",
        "--lora RANK",
        "(default: 5.0)",
        "examples:",
        "--fields NAME [NAME ...]",
    ):
        assert part in out
