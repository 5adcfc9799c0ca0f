"""Configs: what is shipped loads, what is wrong is told in one line with value and remedy."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from judges.errors import UserError
from pipeline.config import Config, load_config, parse_config, threads_of
from pipeline.run_directory import create_run_directory, read_run_config

CHECKOUT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((CHECKOUT / "configs").rglob("*.yaml"))
DESIGN = CHECKOUT.parent / "shared" / "DESIGN.md"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config with a section in each form that the tests below change."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "run: {name: mine, updates: 12}\n"
        "prompts: {path: configs/data/story_openings.jsonl}\n"
        "objective:\n"
        "  beta: 0.1\n"
    )
    return path


def mistakes(file: Path, *overrides: str) -> list[str]:
    """The lines of the error, without the config's name in front."""
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{file}: ") for line in lines)
    return [line.removeprefix(f"{file}: ") for line in lines]


def mistake(file: Path, *overrides: str) -> str:
    (line,) = mistakes(file, *overrides)
    return line


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what loads ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(path)
    source = cfg.prompts.pairs or cfg.prompts.path
    assert source is not None
    assert Path(source).is_file() or "cluster" in path.parts  # those take a hub's data sets
    assert cfg.run_dir == tmp_path / "runs" / cfg.run.name
    assert cfg.run.name == path.stem


def test_configs_are_shipped():
    assert "quickstart.yaml" in [path.name for path in SHIPPED]


@pytest.mark.skipif(not DESIGN.is_file(), reason=f"no {DESIGN}: it is not part of the repository")
def test_the_contracts_config_loads(tmp_path):
    (block,) = re.findall(r"^```yaml\n(.*?)^```", DESIGN.read_text(), re.DOTALL | re.MULTILINE)
    path = tmp_path / "contract.yaml"
    path.write_text(block.replace("path: …", "path: configs/data/story_openings.jsonl"))
    cfg = load_config(path)
    written = yaml.safe_load(path.read_text())
    assert set(written) == set(Config.model_fields)
    assert cfg.learner.learning_rate == 2e-5
    assert cfg.sampling.max_new_tokens == 64
    assert cfg.resampling.replay == [1.0]
    assert cfg.evaluation.prompts is not None
    assert cfg.evaluation.prompts.split == "heldout"


def test_every_default_is_described():
    def undescribed(model: Any, where: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                found += undescribed(field.annotation, f"{where}{name}.")
            elif not field.description:
                found.append(f"{where}{name}")
        return found

    assert undescribed(Config, "") == []


def test_overrides_reach_any_key(file):
    cfg = load_config(
        file,
        [
            "learner.learning_rate=1e-5",
            "resampling.updates_per_round=.inf",
            "run.seed=7",
            "evaluation.judges=[polarity, sentiment]",
            "evaluation.prompts.path=configs/data/story_openings.jsonl",
            "judge.args={a: {b: 1e-3}, c: '1e-3'}",
            "judge.args.a.d=null",
            "tracking.tensorboard=false",
            "objective.beta=0.25",
        ],
    )
    assert cfg.learner.learning_rate == 1e-5
    assert cfg.resampling.updates_per_round == math.inf
    assert cfg.run.seed == 7
    assert [judge.name for judge in cfg.evaluation.judges] == ["polarity", "sentiment"]
    assert cfg.evaluation.prompts is not None
    assert cfg.evaluation.prompts.split == "heldout"
    assert cfg.judge.args == {"a": {"b": 1e-3, "d": None}, "c": "1e-3"}
    assert cfg.tracking.tensorboard is False
    assert cfg.objective.beta == 0.25
    assert cfg.run.updates == 12


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-5", 2e-5), ("-2.0e-5", -2e-5), ("1E3", 1e3), ("+3e+2", 300.0), (".5e-1", 0.05)],
)
def test_exponents_are_numbers_as_in_yaml_1_2(file, text, value):
    file.write_text(file.read_text() + f"judge:\n  args: {{x: {text}}}\n")
    assert load_config(file).judge.args == {"x": value}
    assert load_config(file, [f"judge.args.y={text}"]).judge.args == {"x": value, "y": value}


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "'1e5'", "1e5.0", "e", "."])
def test_what_only_looks_like_an_exponent_is_text(file, text):
    assert load_config(file, [f"judge.args.x={text}"]).judge.args == {"x": text.strip("'")}


def test_files_are_found_beside_the_config_or_in_the_cwd_and_become_absolute(
    file, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    (elsewhere / "rules.py").write_text("")
    (tmp_path / "judge.py").write_text("")
    (tmp_path / "prompts.jsonl").write_text("")
    monkeypatch.chdir(elsewhere)
    cfg = load_config(
        file,
        [
            "judge.name=judge.py:score",
            "pairing.strategy=rules.py:pairs",
            "objective.name=../judge.py:loss",
            "evaluation.judges=[polarity, judge.py:other, installed.module:fn]",
            "evaluation.prompts.path=prompts.jsonl",
            "prompts.path=openai/gsm8k",
            "policy.model=model",
        ],
    )
    assert cfg.judge.name == f"{tmp_path}/judge.py:score"
    assert cfg.pairing.strategy == f"{elsewhere}/rules.py:pairs"
    assert cfg.objective.name == f"{tmp_path}/judge.py:loss"
    assert [judge.name for judge in cfg.evaluation.judges] == [
        "polarity",
        f"{tmp_path}/judge.py:other",
        "installed.module:fn",
    ]
    assert cfg.evaluation.prompts is not None
    assert cfg.evaluation.prompts.path == f"{tmp_path}/prompts.jsonl"
    assert cfg.prompts.path == "openai/gsm8k"
    assert cfg.policy.model == f"{elsewhere}/model"
    assert cfg.run_dir == elsewhere / "runs" / "mine"


def test_a_mixtures_files_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("")
    monkeypatch.chdir("/")
    raw = {"prompts": {"mixture": [{"path": "a.jsonl", "weight": 2}, {"path": "some/dataset"}]}}
    mixture = parse_config(raw, base=tmp_path).prompts.mixture
    assert [source.path for source in mixture] == [f"{tmp_path}/a.jsonl", "some/dataset"]
    assert mixture[0].weight == 2.0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["resampling.updates_per_round=.inf", "resampling.rounds_in_flight=2"],
        ["learner.learning_rate=3e-7", "run.name='1e5'", "judge.args={a: [1e-9, null, '1e5']}"],
        ["objective.name=mine.py:loss", "objective.args={slope: .inf}"],
        ["prompts={mixture: [{path: mine.py}, {path: a/b, weight: 0.25}]}"],
        ["evaluation.prompts={path: mine.py, column: text}", "tracking.wandb={project: p}"],
    ],
)
def test_the_run_directory_gives_the_config_back(file, tmp_path, monkeypatch, overrides):
    (tmp_path / "mine.py").write_text("")
    cfg = load_config(file, [f"run.dir={tmp_path}/run", *overrides])
    create_run_directory(cfg, {"generator": 1, "learner": 2})
    monkeypatch.chdir("/")
    again, environment = read_run_config(tmp_path / "run")
    assert again == cfg
    assert environment["threads"] == {"generator": 1, "learner": 2}
    assert type(again.resampling.updates_per_round) is type(cfg.resampling.updates_per_round)


def test_a_recorded_config_takes_overrides_and_may_have_moved(file, tmp_path):
    create_run_directory(load_config(file, [f"run.dir={tmp_path}/run"]), {"generator": 1})
    (tmp_path / "run").rename(tmp_path / "moved")
    cfg, _ = read_run_config(tmp_path / "moved", ["evaluation.judges=[polarity]", "run.updates=3"])
    assert cfg.run_dir == tmp_path / "moved"
    assert [judge.name for judge in cfg.evaluation.judges] == ["polarity"]
    assert cfg.run.updates == 3
    assert cfg.run.name == "mine"


def test_a_run_is_never_overwritten(file, tmp_path):
    cfg = load_config(file, [f"run.dir={tmp_path}/run"])
    create_run_directory(cfg, {})
    with pytest.raises(UserError, match=f"^run.dir={tmp_path}/run: already exists; .* resume "):
        create_run_directory(cfg, {})
    with pytest.raises(UserError, match=r"elsewhere: not a run directory .it has no config\.yaml"):
        read_run_config(tmp_path / "elsewhere")


# --- what is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("objektive.beta=1", "objektive", "did you mean 'objective'?"),
        ("objective.betta=1", "objective.betta", "did you mean 'beta'?"),
        ("resampling.early.kl_abov=1", "resampling.early.kl_abov", "did you mean 'kl_above'?"),
        ("evaluation.prompts={pth: x}", "evaluation.prompts.pth", "did you mean 'path'?"),
        ("prompts={mixture: [{pth: x}]}", "prompts.mixture[0].pth", "did you mean 'path'?"),
        ("checkpoint.xyz=1", "checkpoint.xyz", "known: every, keep"),
    ],
)
def test_an_unknown_key_names_the_nearest(file, override, key, hint):
    assert mistake(file, override) == f"{key}: unknown key; {hint}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.updates=ten", "must be a whole number — Optimizer steps"),
        ("run.updates=1.5", "must be a whole number — Optimizer steps"),
        ("run.updates=0", "must be greater than or equal to 1 — Optimizer steps"),
        ("run.name=12", "must be text (in quotes where it looks like a number) — Name of the run"),
        ("objective=dpo", "must be a mapping, e.g. {name: dpo, beta: 0.1}"),
        ("objective.beta=0", "must be in (0, ∞)"),
        ("objective.beta=nan", "must be in (0, ∞)"),
        (
            "objective.name=dop",
            "no such objective; did you mean 'dpop'? (your own: path/to/file.py:",
        ),
        ("learner.learning_rate=1e-5x", "must be a number — Peak learning rate"),
        ("learner.threads=few", "must be a whole number or 'auto' — CPU threads; auto = its fair"),
        ("sampling.top_p=2", "must be less than or equal to 1 — Keep the smallest set of tokens"),
        ("sampling.min_p=1", "must be less than 1 — Drop tokens less likely than this share"),
        ("sampling.min_p=nan", "must be less than 1"),
        ("sampling.stop=END", "must be a list — Strings that end a completion"),
        ("generator.max_model_len=1", "must be greater than or equal to 2 — Longest prompt and"),
        ("sampling.truncated=cut", "must be 'train', 'mask' or 'drop' — A completion cut at "),
        ("tracking.tensorboard=7", "must be true or false — Write scalars"),
        ("evaluation.judges=polarity", "must be a list — Judges besides the training judge"),
        ("judge.args=[1]", "must be a mapping of keys to values — Keyword arguments"),
        ("resampling.updates_per_round=0", "a whole number from 1, or .inf"),
        ("resampling.updates_per_round=1.5", "a whole number from 1, or .inf"),
        ("resampling.updates_per_round=often", "must be a whole number or a number — Updates fed"),
        ("resampling.passes=13", "more than run.updates=12; a round cannot be passed over that"),
        ("resampling.replay=[]", "shares above 0, e.g. [0.55, 0.3, 0.15], or all"),
        ("resampling.replay=[1, 0]", "shares above 0, e.g. [0.55, 0.3, 0.15], or all"),
        ("resampling.replay=[0.5, 0.3]", "the shares sum to 0.8, not to 1: mend them"),
        (
            "resampling.replay=[0.4, 0.6]",
            "an earlier round has 0.4 of a round's prompts to give, not 0.6: let the first share be"
            " the largest",
        ),
        (
            "resampling.correction=importance",
            "must be 'none', 'raw', 'clipped', 'self_normalized' or 'wpo' — Weight of a pair older",
        ),
        ("resampling.clip=0", "must be in (0, ∞)"),
        ("resampling.early.ess_below=1", "must be in (0, 1)"),
        ("resampling.early.kl_above=0", "must be in (0, ∞)"),
        ("policy.lora=rank8", "must be a mapping of keys to values — null: all weights are le"),
        ("policy.lora.rank=0", "must be greater than or equal to 1 — Rows of A, columns of B"),
        ("policy.lora.alpha=0", "must be in (0, ∞)"),
        ("policy.lora.target_modules=q_proj", "must be all-linear or a list of module names, e"),
        ("policy.lora.target_modules=[]", "must be all-linear or a list of module names, e.g. "),
        ("learner.workers=0", "must be greater than or equal to 1 — Learner processes; `fre"),
        ("learner.gpus=2", "must be less than or equal to 1 — GPU to learn on, or a share of one"),
        (
            "generator.gpus=-1",
            "must be greater than or equal to 0 — GPUs of each; fractions share ",
        ),
        ("generator.backend=tgi", "must be 'auto', 'transformers' or 'vllm' — Sampling engine; "),
        ("reference.update=ema", "must be frozen, {every_rounds: N} or {ema: a}"),
        ("cluster.address=there", "must be local, auto, inline or ray://HOST:PORT"),
    ],
)
def test_a_wrong_value_is_told_with_what_it_must_be(file, override, said):
    assert mistake(file, override.replace("=nan", "=.nan")).startswith(f"{override}: {said}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.name=", "run.name=null: must be text "),
        ("run.name=''", "run.name=: must be non-empty — Name of the run"),
        ("prompts=", "prompts=null: must be a mapping of keys to values"),
        ("prompts={}", "prompts: give either path or mixture"),
        ("prompts={mixture: [{path: a, weight: 0}]}", "prompts.mixture[0].weight=0: must be gre"),
        ("evaluation.judges=[x, 1]", "evaluation.judges[1]=1: must be a mapping "),
        ("policy.lora=true", "policy.lora=true: must be a mapping of keys to values — null: "),
        ("policy.lora.target_modules=[1]", "policy.lora.target_modules[0]=1: must be text "),
        ("sampling.stop_tokens=[true]", "sampling.stop_tokens[0]=true: must be a whole number or "),
        ("sampling.stop=['']", "sampling.stop[0]=: must be non-empty — Strings that end a comple"),
        ("prompts.chat_template_args=[1]", "prompts.chat_template_args=[1]: must be a mapping of"),
        (
            "prompts.chat_template_args={tokenize: false}",
            "prompts.chat_template_args: tokenize is no argument of the template's own: leave it",
        ),
        ("tracking.wandb={}", "tracking.wandb.project: missing — Weights & Biases project"),
        (
            "drift.warn={kl_tokn: 5}",
            "drift.warn.kl_tokn: unknown measure; the nearest is 'kl_per_",
        ),
        (
            "drift.resample.kl=5",
            "drift.resample.kl: unknown measure; the nearest is 'kl_to_ref",
        ),
        ("drift.stop.entropy=high", "drift.stop.entropy=high: "),
        ("policy.lora={r: 8}", "policy.lora.r: unknown key; did you mean 'rank'?"),
        ("policy.lora={dropout: 0}", "policy.lora.dropout: unknown key; known: rank, alpha, "),
        ("generator.engine=7", "generator.engine=7: must be a mapping of keys to values — More "),
        ("reference.update={ema: 1}", "reference.update.ema=1: must be in (0, 1)"),
        ("resampling.early={ess_below: 1}", "resampling.early.ess_below=1: must be in (0, 1)"),
        ("resampling.early.args={n: 1}", "resampling: early.args: are of a rule of your own: set"),
        ("resampling.adaptive={min: 4, max: 2}", "resampling.adaptive: min: 4 is more than max, 2"),
        (
            "resampling={adaptive: {max: 4}, updates_per_round: 8}",
            "resampling: updates_per_round=8: adaptive starts from it, so it must be from 1 to 4",
        ),
        ("prompts.too_long=drop", "prompts: too_long: is of given pairs: set pairs, or leave it"),
        ("prompts.pairs=p.jsonl", "prompts: either pairs or path: given pairs bring their own"),
        # A long value is cut, a broken one is joined: a mistake has one line.
        (f"run.name=[{60 * 'x'}]", f"run.name=['{55 * 'x'}…: must be text "),
        ('judge.link="a\\nb"', "judge.link=a b: must be 'hard', 'bradley_terry' or "),
    ],
)
def test_a_wrong_value_is_shown_as_in_yaml(file, override, said):
    assert mistake(file, override).startswith(said)


@pytest.mark.parametrize("judge", ["judge", "judge.second", "evaluation.judges[0]"])
@pytest.mark.parametrize(
    ("client", "said"),
    [
        ("{kind: openai}", "model: missing — The name that the server knows it by"),
        ("{kind: openai, model: a, modle: b}", "modle: unknown key; did you mean 'model'?"),
        ("{kind: vllm, modle: b, model: a}", "modle: unknown key; did you mean 'model'?"),
    ],
)
def test_a_mistake_in_a_judges_client_has_its_key(file, judge, client, said):
    section = f"{{name: llm_pairwise, client: {client}}}"
    listed = judge.endswith("]")
    override = f"{judge[:-3]}=[{section}]" if listed else f"{judge}={section}"
    assert mistake(file, override) == f"{judge}.client.{said}"


SECRETS = (
    "http://bob:secret@host/v1",
    "http://bob:se/c@secret@host/v1",
    "http://bob:a secret@host/v1",
    "bob:secret@host/v1",
    "https://host/v1?key=secret",
)


@pytest.mark.parametrize("address", SECRETS)
@pytest.mark.parametrize(
    "override",
    [
        "judge.client='{}'",
        "judge.client={{kind: openai, model: m, base_url: '{}'}}",
        "judge.client={{kind: openai, model: m, extra_body: '{}'}}",
        "judge=[{{base_url: '{}'}}]",
    ],
)
def test_a_mistake_never_shows_a_password(file, override, address):
    assert "secret" not in mistake(file, override.format(address))


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("judge.second={name: sentiment, args: {a: 1}}", "judge.second"),
        ("judge={select: uncertainty, budget: {labels: 9}, select_by: [polarity, {name: sentiment, "
         "args: {a: 1}}]}", "judge.select_by"),
        ("evaluation.judges=[{name: sentiment, args: {a: 1}}]", "evaluation.judges"),
    ],
)  # fmt: skip
def test_two_judges_of_one_title_are_told_where_they_stand(file, override, section):
    assert mistake(file, override).startswith(f"{section}: sentiment stands for two judges")


def test_a_pair_needs_two_completions(file):
    said = "sampling.completions_per_prompt=1: a pair needs at least 2"
    assert mistakes(file, "sampling.completions_per_prompt=1") == [said]


def test_each_mistake_has_its_line(file):
    assert mistakes(
        file, "lerner.workers=2", "learner.workers=0", "resampling.updates_per_round=x", "run=3"
    ) == [
        "run=3: must be a mapping of keys to values",
        "resampling.updates_per_round=x: must be a whole number or a number — Updates fed by one "
        "sampling: 1 is on-policy, .inf samples once",
        "learner.workers=0: must be greater than or equal to 1 — Learner processes; `freshpairs "
        "plan` lays out more, a run has one as yet",
        "lerner: unknown key; did you mean 'learner'?",
    ]


def test_prompts_are_needed(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {name: x}\n")
    assert mistake(tmp_path / "c.yaml").startswith("prompts: missing")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.updates.foo=1", "run.updates.foo=1: run.updates is a value, not a section"),
        ("run.updates:3", "run.updates:3: an override has the form key.path=value"),
        ("=3", "=3: an override has the form key.path=value"),
        ("run..updates=3", "run..updates=3: an override has the form key.path=value"),
        ("run.updates=[1", "run.updates=[1: not valid YAML: "),
    ],
)
def test_an_override_that_is_none(file, override, said):
    assert refused(file, override).startswith(said)


def test_a_plugin_file_that_is_not_there(file, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for key in ("judge.name", "objective.name", "pairing.strategy"):
        said = f"{key}=no.py:f: no file no.py in {tmp_path} or {tmp_path}/cwd: "
        assert refused(file, f"{key}=no.py:f").startswith(said)
    said = f"evaluation.judges[1].name=no.py:f: no file no.py in {tmp_path} or {tmp_path}/cwd: "
    assert refused(file, "evaluation.judges=[polarity, no.py:f]").startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: [1", "not valid YAML: while parsing a flow sequence"),
        ("run:\n\tname: x", "not valid YAML: "),
        ("", "a config is a mapping of sections (run:, policy:, …)"),
        ("- run", "a config is a mapping of sections (run:, policy:, …)"),
        ("just words", "a config is a mapping of sections (run:, policy:, …)"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert refused(path).startswith(f"{path}: {said}")


def test_a_binary_file_is_no_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert refused(path).startswith(f"{path}: not valid YAML: ")


def test_a_missing_file_names_the_nearest(file, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert refused(tmp_path / "mne.yaml") == (
        f"{tmp_path}/mne.yaml: no such config file; did you mean {file}?"
    )
    assert refused(tmp_path / "other.toml") == f"{tmp_path}/other.toml: no such config file"
    assert refused(tmp_path / "no" / "a.yaml") == f"{tmp_path}/no/a.yaml: no such config file"


# --- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_flight", "replicas", "threads", "cores", "expected"),
    [
        # Taking turns: all cores for both, generators share theirs.
        (0, 1, ("auto", "auto"), 8, (8, 8)),
        (0, 3, ("auto", "auto"), 8, (2, 8)),
        (0, 4, ("auto", "auto"), 2, (1, 2)),
        (0, 1, ("auto", "auto"), 1, (1, 1)),
        # Overlapping: half the cores each, never none.
        (1, 1, ("auto", "auto"), 8, (4, 4)),
        (1, 2, ("auto", "auto"), 8, (2, 4)),
        (2, 1, ("auto", "auto"), 7, (3, 4)),
        (1, 1, ("auto", "auto"), 2, (1, 1)),
        (1, 1, ("auto", "auto"), 1, (1, 1)),
        # What is given is given.
        (0, 2, (5, "auto"), 8, (5, 8)),
        (1, 2, ("auto", 7), 8, (2, 7)),
        (1, 1, (3, 9), 2, (3, 9)),
    ],
)
def test_threads_by_hand(in_flight, replicas, threads, cores, expected):
    raw = {
        "prompts": {"path": "x.jsonl"},
        "resampling": {"rounds_in_flight": in_flight},
        "generator": {"replicas": replicas, "threads": threads[0]},
        "learner": {"threads": threads[1]},
    }
    assert threads_of(parse_config(raw, base=Path()), cores) == expected


def test_held_out_prompts_may_be_a_mixture() -> None:
    sources = [{"path": "a.jsonl", "split": "heldout"}, {"path": "b.jsonl", "split": "heldout"}]
    raw = {"prompts": {"path": "a.jsonl"}, "evaluation": {"prompts": {"mixture": sources}}}
    held_out = parse_config(raw, base=Path()).evaluation.prompts
    assert held_out is not None
    assert [source.split for source in held_out.mixture] == ["heldout", "heldout"]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("learner", "threads", 0),
        ("generator", "threads", -3),
        ("sampling", "temperature", math.inf),
    ],
)
def test_impossible_numbers_are_one_line(section: str, key: str, value: float) -> None:
    raw = {"prompts": {"path": "a.jsonl"}, section: {key: value}}
    with pytest.raises(UserError, match=rf"{section}\.{key}={value}: must be") as mistake:
        parse_config(raw, base=Path())
    assert "\n" not in str(mistake.value)


def test_a_runs_record_is_a_config_of_another_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = {"run": {"name": "first", "dir": str(tmp_path / "elsewhere")}, "prompts": {"path": "a"}}
    create_run_directory(parse_config(raw, base=tmp_path), {"generator": 1, "learner": 1})
    recorded = tmp_path / "elsewhere" / "config.yaml"
    assert load_config(recorded).run_dir == tmp_path / "runs" / "first"
    assert load_config(recorded, ["run.name=second"]).run_dir == tmp_path / "runs" / "second"
    given = load_config(recorded, [f"run.dir={tmp_path / 'there'}"])
    assert given.run_dir == tmp_path / "there"


def test_a_kept_config_of_a_judge_that_also_evaluates_is_read_again(file, tmp_path):
    """A bare name beside the judge of that name means that judge, spelled out or not."""
    rules = "judge={name: regex, args: {pattern: hello}}"
    cfg = load_config(file, [rules, "evaluation.judges=[regex]"])
    assert parse_config(cfg.model_dump(), tmp_path) == cfg
