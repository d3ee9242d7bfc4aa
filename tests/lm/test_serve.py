"""Test a model behind HTTP, with OpenAI's client and transformers' own."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from support.processes import HANG

from fastlm.cli import main
from fastlm.lm.data.tokenizer import begin_texts, load_tokenizer
from fastlm.lm.finetuning.translate import CHAT
from fastlm.lm.model.checkpoint import load, save
from fastlm.lm.model.generate import TextGenerator
from fastlm.lm.model.presets import build

# The server says that attention runs on fastlm, and how often. Its paged cache is small, because to set one up takes long.
SERVER = """
import sys
from functools import partial
import transformers.cli.serve as cli
from fastlm.integrations.transformers import attention, continuous_batching
def count(module, name):
    run = getattr(module, name)
    def counted(*arguments, **options):
        print(name, "ran on fastlm", file=sys.stderr, flush=True)
        return run(*arguments, **options)
    setattr(module, name, counted)
count(attention, "attention")
count(continuous_batching, "kvcache_attention")
cli.Serve = partial(cli.Serve, cb_num_blocks=64, cb_max_batch_tokens=256)
from fastlm.cli import main
sys.exit(main(["lm", "serve", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    folder, tokenizer = tmp_path_factory.mktemp("served") / "model", load_tokenizer(corpus)
    begin_texts(tokenizer)
    save(build("decoder", "tiny", tokenizer, seed=3), tokenizer, folder)
    return folder


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[str, Path]]:
    """Start ``fastlm lm serve`` on a free port; yield its address and the file of what it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", folder.parent / f"log{port}"
    command = [sys.executable, "-c", SERVER, str(folder), "--host", "127.0.0.1", "--port", str(port), *flags]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        end = time.monotonic() + HANG
        while not _answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield address, log
    finally:
        process.terminate()
        process.wait(HANG)


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder) as served:
        yield served


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_openai_s_client_gets_the_model_s_text(server, folder):
    address, log = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    expected = TextGenerator(*load(folder)).sample(prompt="the cat", temperature=0, max_new_tokens=6)[0]
    options = {"model": str(folder), "max_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": "the cat"}]
    assert "the cat" + client.chat.completions.create(messages=messages, **options).choices[0].message.content == expected
    assert "the cat" + client.completions.create(prompt="the cat", **options).choices[0].text == expected
    pieces = client.chat.completions.create(messages=messages, stream=True, **options)
    assert "the cat" + "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected
    assert log.read_text().count("attention ran on fastlm") >= 3 * 6 * 2, "two layers, six tokens, three times"


def test_requests_that_come_together_are_one_batch(folder):
    prompts = ["the cat", "the dog sat", "a", "a dog and a cat"]
    writer = TextGenerator(*load(folder))
    expected = [writer.sample(prompt=prompt, temperature=0, max_new_tokens=6)[0].removeprefix(prompt) for prompt in prompts]
    with serving(folder, "--continuous-batching") as (address, log), ThreadPoolExecutor(len(prompts)) as threads:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask(prompt: str) -> str:
            return client.completions.create(model=str(folder), max_tokens=6, temperature=0, prompt=prompt).choices[0].text

        assert list(threads.map(ask, prompts)) == expected
        assert "kvcache_attention ran on fastlm" in log.read_text(), "pages are read in place"


def test_transformers_chat_talks_to_it(server, folder, tmp_path):
    address, _ = server
    code = "from transformers.cli.transformers import main; main()"
    flags = ["max_new_tokens=6", "do_sample=False"]
    command = [sys.executable, "-c", code, "chat", str(folder), address, *flags]
    # It asks whether to go on after the last token, and gets a no.
    chat = subprocess.run(command, input="the cat\nN\n!exit\n", capture_output=True, text=True, cwd=tmp_path, timeout=HANG)
    assert chat.returncode == 0, chat.stderr
    expected = TextGenerator(*load(folder)).sample(prompt="the cat", temperature=0, max_new_tokens=6)[0].removeprefix("the cat")
    assert re.sub(r"\s", "", expected) in re.sub(r"\s", "", chat.stdout)


def test_a_message_to_a_translator_is_its_source(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "the cat"}]
    as_saved = {"split_special_tokens": False}
    options = {"chat_template": CHAT, "add_generation_prompt": True, "tokenizer_kwargs": as_saved}
    ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    bos = tokenizer.bos_token_id
    assert ids == [bos, *tokenizer("the cat", add_special_tokens=False)["input_ids"], bos]


def test_what_cannot_be_served(tmp_path, corpus, capsys, monkeypatch):
    tokenizer = load_tokenizer(corpus)
    save(build("vae", "tiny", tokenizer), tokenizer, tmp_path / "vae")

    def refused(folder: str) -> str:
        assert main(["lm", "serve", str(tmp_path / folder)]) == 1
        return capsys.readouterr().err

    assert refused("none") == (
        f"fastlm lm serve: {tmp_path}/none is no checkpoint, as it lacks config.json: fastlm lm train --model decoder\n"
    )
    assert refused("vae") == (
        f"fastlm lm serve: {tmp_path}/vae is a TextVAE; the server takes a decoder: fastlm lm train --model decoder\n"
    )
    find = importlib.util.find_spec
    monkeypatch.setattr("fastlm.lm.extras.find_spec", lambda name: None if name == "uvicorn" else find(name))
    monkeypatch.setattr("fastlm.lm.model.serve.kind_of", lambda folder: "llama")
    assert refused("vae") == "fastlm lm serve: this needs uvicorn: pip install 'fastlm[serve]'\n"
