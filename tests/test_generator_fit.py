"""A generator section that cannot do what the rest of the config asks is one clear line."""

from __future__ import annotations

import pytest

from judges.errors import UserError
from pipeline import job
from pipeline.run_directory import read_run_config
from tests import tiny
from workers.generator import GeneratorOptions
from workers.learner.needs import Needs

VLLM = {"backend": "vllm"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"generator": VLLM, "objective": {"name": "xpo"}},
            "generator.backend=vllm: xpo draws from a mixture of policy and reference, and a vLLM "
            "engine holds one model: use transformers",
        ),
        ({"generator": {"engine": {"max_num_seqs": 4}}}, "generator.engine=max_num_seqs: the emb"),
        ({"generator": {"gpus": 0.5}}, "generator.gpus=0.5: the embedded transformers backend"),
        ({"generator": {"dtype": "bfloat16"}}, "generator.dtype=bfloat16: the embedded transf"),
        (
            {"generator": {"in_flight_updates": True}, "resampling": {"rounds_in_flight": 1}},
            "generator.in_flight_updates=true: the embedded transformers backend samples in",
        ),
        (
            {"generator": VLLM | {"in_flight_updates": True}, "cluster": {"address": "local"}},
            "generator.in_flight_updates=true: with resampling.rounds_in_flight=0 no round is",
        ),
        (
            {
                "generator": VLLM | {"in_flight_updates": True},
                "resampling": {"rounds_in_flight": 1},
            },
            "generator.in_flight_updates=true: with cluster.address=inline no round is",
        ),
        (
            {
                "generator": VLLM | {"transport": "nccl", "gpus": 1},
                "cluster": {"address": "local"},
            },
            "generator.transport=nccl: moves weights from GPU to GPU, but generator.gpus=1 and "
            "learner.gpus=0: give both a GPU, or use object_store or gloo",
        ),
        (
            {"generator": VLLM | {"transport": "ipc", "gpus": 0.5}, "learner": {"gpus": 0.5}},
            "generator.transport=ipc: moves weights between processes, and cluster.address=inl",
        ),
        (
            {"generator": VLLM | {"gpus": 0.5, "engine": {"tensor_parallel_size": 2}}},
            "generator.gpus=0.5: an engine of 2 GPUs (tensor_parallel_size × pipeline_parallel",
        ),
        (
            {
                "generator": VLLM
                | {"in_flight_updates": True, "engine": {"async_scheduling": True}},
                "resampling": {"rounds_in_flight": 1},
                "cluster": {"address": "local"},
            },
            "generator.engine.async_scheduling=true: with in_flight_updates a step must be over",
        ),
        (
            {"generator": {"gap": {"correct_above": 0.1}}, "resampling": {"rounds_in_flight": 2}},
            "generator.gap.correct_above: the learner recomputes a round by the version that",
        ),
        (
            {"generator": {"gap": {"correction": "truncated"}}},
            "generator.gap.correction=truncated: no round is corrected without generator.gap.corr",
        ),
        (
            {
                "generator": {"gap": {"correct_above": 0.1, "correction": "truncated"}},
                "objective": {"name": "pdpo", "weights": "clipped"},
                "pairing": {"ties": "keep"},
            },
            "generator.gap.correction=truncated: importance weights count the gap already",
        ),
    ],
)
def test_a_misfit_is_told_in_a_line(tiny_model, tmp_path, sections, said):
    with pytest.raises(UserError) as refused:
        tiny.config(tiny_model, tmp_path, **sections)
    (line,) = str(refused.value).splitlines()
    assert said in line


def test_a_run_records_what_auto_stood_for(tiny_model, tmp_path, monkeypatch):
    """Installing vLLM later changes nothing for a run that is resumed."""
    monkeypatch.setattr("workers.generator.find_spec", lambda _: None)
    cfg = tiny.config(tiny_model, tmp_path, generator={"backend": "auto"}, run={"updates": 1})
    run_dir = job.run(cfg, quiet=True).run_dir
    monkeypatch.setattr("workers.generator.find_spec", lambda _: object())
    recorded, _ = read_run_config(run_dir)
    assert recorded.generator.backend == "transformers"


def test_auto_is_vllm_where_it_is_installed_and_will_do(monkeypatch):
    options = GeneratorOptions()
    monkeypatch.setattr("workers.generator.find_spec", lambda name: name == "vllm")
    assert options.backend_for(Needs()) == "vllm"
    assert options.backend_for(Needs(opponent=0.5)) == "transformers"
    monkeypatch.setattr("workers.generator.find_spec", lambda _: None)
    assert options.backend_for(Needs()) == "transformers"
    assert GeneratorOptions(backend="vllm").backend_for(Needs()) == "vllm"
