"""vLLM samples what the learner says, after every push, and every planted fault is caught."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from judges.errors import UserError
from tests.vllm_helpers import (
    learner_of,
    perturb,
    probe_of,
    prompts_of,
    push,
    sampled,
    save_untied,
    scored,
)
from workers.generator import GeneratorOptions, SampleRequest, SamplingOptions
from workers.messages import Prompt
from workers.options import PolicyOptions
from workers.sampler import truncate
from workers.seeds import derive_seed
from workers.vllm_engine import refuse_unknown_arguments
from workers.weight_sync.buckets import Carried, SyncError, pack
from workers.weight_sync.proof import probe_gap
from workers.weight_sync.transport import ObjectStore, push_of

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM warns

NEW_TOKENS = 24
ENGINE = {"max_num_seqs": 32, "kv_cache_memory_bytes": 128 << 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory, stories15m):
    return {"tied": stories15m, "untied": save_untied(tmp_path_factory.mktemp("untied"))}


@pytest.fixture(scope="module", autouse=True)
def no_engine_ends():
    """Engines of one process share vLLM's process groups: the first to end would take them away."""
    from workers import vllm_generator

    kept, build_engine = [], vllm_generator.build_engine

    def keep(*args):
        kept.append(build_engine(*args))
        return kept[-1]

    vllm_generator.build_engine = keep
    yield
    vllm_generator.build_engine = build_engine


def build(model, policy=None, sampling=None, needs_sampling_logprobs=False, **options):
    from workers.vllm_generator import VllmGenerator

    return VllmGenerator(
        PolicyOptions(model=str(model), **(policy or {})),
        SamplingOptions(max_new_tokens=NEW_TOKENS, **(sampling or {})),
        GeneratorOptions(backend="vllm", engine=ENGINE, **options),
        needs_sampling_logprobs,
    )


@pytest.fixture(scope="module")
def engines(models):
    """A generator of each model, built when it is first asked for, used by many tests."""
    built = {}

    def engine(kind):
        if kind not in built:
            built[kind] = build(models[kind])
        return built[kind]

    return engine


@pytest.mark.parametrize("transport", ["object_store", "gloo"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_after_a_push_it_is_the_learner(engines, models, kind, transport):
    """Greedy: token for token what full forward passes give. Sampled: the same log-probability."""
    generator, learner = engines(kind), learner_of(models[kind], transport)
    prompts, probe_ids = prompts_of(models[kind], 8), probe_of(models[kind])
    previous = None
    for version in (0, 1, 2):
        if version:
            perturb(learner, version)
        proof = push(generator, learner, probe_ids)
        assert (proof.version, proof.checksum) == (version, learner.sent().checksum)
        assert proof.gap < 1e-4

        greedy = [generator.probe(prompt.ids, NEW_TOKENS) for prompt in prompts]
        expected = [learner.probe(prompt.ids, NEW_TOKENS) for prompt in prompts]
        assert [g.ids.tolist() for g in greedy] == [e.ids.tolist() for e in expected]
        assert max(map(probe_gap, greedy, expected)) < 1e-4
        assert previous != [g.ids.tolist() for g in greedy]
        previous = [g.ids.tolist() for g in greedy]

        completions = sampled(generator, prompts)
        own = scored(learner, prompts, completions)
        gaps = [np.abs(c.logprobs - o).max() for c, o in zip(completions, own, strict=True)]
        assert max(gaps) < 1e-4
        assert {(c.version, c.last_version) for c in completions} == {(version, None)}
        assert {c.sampling_logprobs is None for c in completions} == {True}


def test_requests_have_derived_seeds_whatever_they_are_sampled_beside(engines, models):
    generator, learner = engines("tied"), learner_of(models["tied"])
    push(generator, learner, probe_of(models["tied"]))
    prompts = prompts_of(models["tied"], 8)
    together = sampled(generator, prompts)
    assert [(c.position, c.sample) for c in together] == [
        (position, sample) for position in range(10, 18) for sample in (0, 1)
    ]
    for completion in together:
        own = (completion.position, completion.sample)
        assert completion.seed == derive_seed(0, "sampling", *own)
    apart = [c for prompt in reversed(prompts) for c in sampled(generator, [prompt])]
    by_key = {(c.position, c.sample): c for c in apart}
    same = [by_key[c.position, c.sample].ids.tolist() == c.ids.tolist() for c in together]
    assert np.mean(same) > 0.8  # a rounding may turn a near tie, no more
    ids = {tuple(c.ids.tolist()) for c in together}
    assert len(ids) == len(together)


def test_more_prompts_than_a_step_takes_wait_whole(models, monkeypatch):
    """On the CPU vLLM ends where a step computes a part of a prompt whose request has a seed."""
    monkeypatch.setitem(ENGINE, "max_num_batched_tokens", 512)
    generator, learner = build(models["untied"]), learner_of(models["untied"])
    push(generator, learner, probe_of(models["untied"]))
    ids = np.array([1, *(3 + np.arange(99) % 61)], np.int64)
    prompts = [Prompt(i, np.roll(ids, i), "x") for i in range(16)]
    completions = sampled(generator, prompts)
    own = scored(learner, prompts, completions)
    assert max(np.abs(c.logprobs - o).max() for c, o in zip(completions, own, strict=True)) < 1e-4


def test_completions_end_as_they_were_drawn(engines, models):
    """An EOS is the last id and was sampled, or there is none."""
    generator, learner = engines("untied"), learner_of(models["untied"])
    push(generator, learner, probe_of(models["untied"]))
    completions = sampled(generator, prompts_of(models["untied"], 32), samples=4)
    ended = [c for c in completions if c.finished]
    assert 0 < len(ended) < len(completions)
    assert all(c.ids[-1] == 2 for c in ended)
    assert all(2 not in c.ids[:-1].tolist() for c in completions)
    assert all(len(c.ids) == NEW_TOKENS for c in completions if not c.finished)


# --- planted faults --------------------------------------------------------------------------


def test_a_skipped_repack_of_the_tied_head_is_caught(engines, models, monkeypatch):
    generator, learner = engines("tied"), learner_of(models["tied"])
    probe_ids = probe_of(models["tied"])
    push(generator, learner, probe_ids)
    perturb(learner, 1)
    monkeypatch.setattr("workers.vllm_worker.PushReceiver._repack_tied_head", lambda *_: None)
    with pytest.raises(SyncError, match="holds version 1, but its probe differs from the learner"):
        push(generator, learner, probe_ids)
    with pytest.raises(SyncError, match="does not sample: it holds version 1, but its probe"):
        sampled(generator, prompts_of(models["tied"], 1))
    monkeypatch.undo()
    assert push(generator, learner, probe_ids).gap < 1e-4
    assert sampled(generator, prompts_of(models["tied"], 1))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_skipped_reset_of_the_prefix_cache_is_caught(engines, models, monkeypatch, kind):
    """The probe's first block is cached since the push before: stale keys and values."""
    generator, learner = engines(kind), learner_of(models[kind])
    probe_ids = probe_of(models[kind])
    push(generator, learner, probe_ids)
    perturb(learner, 1)
    monkeypatch.setattr(generator._engine, "reset_prefix_cache", lambda **_: True)
    with pytest.raises(SyncError, match="holds version 1, but its probe differs from the learner"):
        push(generator, learner, probe_ids)
    monkeypatch.undo()
    assert push(generator, learner, probe_ids).gap < 1e-4


def in_small_buckets(learner, transport):
    packed = pack(dict(learner._policy.named_parameters()), bucket_bytes=1 << 14)
    assert len(packed) > 4
    return packed, push_of(learner.version, packed, transport)


def test_a_bucket_that_does_not_come_is_caught(engines, models):
    generator, learner = engines("untied"), learner_of(models["untied"])
    probe_ids = probe_of(models["untied"])
    push(generator, learner, probe_ids)
    perturb(learner, 1)
    _, whole = in_small_buckets(learner, ObjectStore())
    torn = dataclasses.replace(whole, source=Carried(whole.source.data[:-1]))
    with pytest.raises(SyncError, match=r"version 1: \d+ of \d+ buckets came"):
        generator.load(torn)
    unlisted = dataclasses.replace(whole, buckets=whole.buckets[:-1])
    with pytest.raises(SyncError, match=r"version 1: lists \d+ buckets, which are not those that"):
        generator.load(unlisted)
    learner.weights()
    proof = (probe_ids, learner.sent(), learner.probe(probe_ids, 4), 1e-3)
    with pytest.raises(SyncError, match=r"lists \d+ buckets"):
        generator.prove(*proof)
    with pytest.raises(SyncError, match="does not sample: it weight push of version 1"):
        sampled(generator, prompts_of(models["untied"], 1))
    assert push(generator, learner, probe_ids).gap < 1e-4


def test_a_bucket_left_out_of_both_lists_is_caught_by_the_learners_checksum(engines, models):
    """A push that is whole in itself, but not what the learner sent."""
    generator, learner = engines("untied"), learner_of(models["untied"])
    probe_ids = probe_of(models["untied"])
    packed, _ = in_small_buckets(learner, ObjectStore())
    learner.weights()
    generator.load(push_of(0, packed[:-1], ObjectStore()))
    with pytest.raises(SyncError, match=r"answered a push of version 0 \(checksum .*\) with"):
        generator.prove(probe_ids, learner.sent(), learner.probe(probe_ids, 4), 1e-3)
    assert push(generator, learner, probe_ids).gap < 1e-4


def test_a_corrupted_byte_is_caught_on_its_way_over_gloo(engines, models):
    from workers.weight_sync.process_group import GroupTransport

    generator, learner = engines("untied"), learner_of(models["untied"])
    transport = GroupTransport("gloo")
    packed, sent = in_small_buckets(learner, transport)
    packed[3][1][7] ^= 1
    with pytest.raises(SyncError, match="version 0: bucket 3 arrived corrupted"):
        generator.load(sent)
    transport.release(below=1)
    with pytest.raises(SyncError, match="version 0: the learner no longer has it"):
        generator.load(sent)
    assert push(generator, learner, probe_of(models["untied"])).gap < 1e-4


# --- how tokens are drawn --------------------------------------------------------------------


@pytest.fixture(scope="module")
def reshaping(models):
    sampling = {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.02,
        "stop_tokens": ["w7"],
        "stop": ["w11 w12", "w30"],
    }
    return build(models["untied"], sampling=sampling, needs_sampling_logprobs=True), sampling


def test_both_log_probabilities_are_recorded(reshaping, models):
    """Plain, as the learner scores; as drawn, as our own sampler reshapes the learner's logits."""
    generator, options = reshaping
    learner = learner_of(models["untied"])
    push(generator, learner, probe_of(models["untied"]))
    prompts = prompts_of(models["untied"], 16)
    completions = sampled(generator, prompts)
    ids = {prompt.position: prompt.ids for prompt in prompts}
    for completion, own in zip(completions, scored(learner, prompts, completions), strict=True):
        np.testing.assert_allclose(completion.logprobs, own, atol=1e-4)
        both = torch.tensor([*ids[completion.position], *completion.ids])
        with torch.no_grad():
            logits = learner._policy(both[None]).logits[0, len(ids[completion.position]) - 1 : -1]
        shaped = truncate(logits / 0.8, options["top_k"], options["top_p"], options["min_p"])
        drawn = shaped.log_softmax(-1).gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        np.testing.assert_allclose(completion.sampling_logprobs, drawn.numpy(), atol=2e-4)
        assert np.abs(completion.sampling_logprobs - completion.logprobs).max() > 1e-3


def test_stop_tokens_and_strings_end_a_completion_and_stay_in_it(reshaping, models):
    generator, _ = reshaping
    push(generator, learner_of(models["untied"]), probe_of(models["untied"]))
    completions = sampled(generator, prompts_of(models["untied"], 64), samples=4)
    by_token = [c for c in completions if c.ids[-1] == 3 + 7]
    by_string = [c for c in completions if c.text.endswith(("w11 w12", "w30"))]
    assert by_token
    assert by_string
    assert all(c.finished for c in by_token + by_string)
    for completion in completions:
        assert not any(s in completion.text[:-1] for s in ("w11 w12 ", "w30 "))
        assert 3 + 7 not in completion.ids[:-1].tolist()
        if not completion.finished:
            assert len(completion.ids) == NEW_TOKENS


def test_an_engine_that_hides_how_it_drew_is_refused_where_it_matters(models, monkeypatch):
    monkeypatch.setattr(
        "workers.vllm_worker.PushReceiver.record_sampling_logprobs", lambda _: False
    )
    said = r"^generator.backend=vllm: this engine does not tell .* \(temperature=0.5\), which imp"
    with pytest.raises(UserError, match=said):
        build(models["untied"], sampling={"temperature": 0.5}, needs_sampling_logprobs=True)
    generator = build(models["untied"], sampling={"temperature": 0.5})
    push(generator, learner_of(models["untied"]), probe_of(models["untied"]))
    for completion in sampled(generator, prompts_of(models["untied"], 2)):
        assert np.isnan(completion.behaviour_logprobs).all()
        assert np.isfinite(completion.logprobs).all()


# --- updates in flight -----------------------------------------------------------------------


def test_an_update_in_flight_goes_on_with_the_new_weights(models):
    """Tokens before it are of version 0, those after of version 1: each by its own learner."""
    generator = build(models["tied"], in_flight_updates=True)
    before, after = learner_of(models["tied"]), learner_of(models["tied"])
    perturb(after, 1)
    probe_ids, prompts = probe_of(models["tied"]), prompts_of(models["tied"], 16)
    push(generator, before, probe_ids)

    steps, step = threading.Event(), generator._engine.step
    taken, proving = [], []
    prove = generator.prove

    def watched(*args):
        began, unfinished = len(taken), generator._engine.get_num_unfinished_requests()
        assert unfinished > 0
        proof = prove(*args)
        proving.append(len(taken) - began)
        assert generator._engine.get_num_unfinished_requests() == unfinished
        return proof

    generator.prove = watched

    def counted():
        taken.append(1)
        if len(taken) == 10:
            steps.set()
        if len(taken) >= 10:
            time.sleep(0.02)  # the push is on its way
        return step()

    generator._engine.step = counted
    found = []
    request = SampleRequest(prompts, 2, 0, "sampling", after_push=1)
    sampling = threading.Thread(target=lambda: found.append(generator.sample(request)))
    sampling.start()
    assert steps.wait(60)
    assert push(generator, after, probe_ids).gap < 1e-4
    sampling.join(60)
    assert proving == [4]  # the probe's own four tokens: nothing else was sampled meanwhile
    assert not generator._finished

    completions = [c for group in found[0].completions for c in group]
    old, new = scored(before, prompts, completions), scored(after, prompts, completions)
    assert {c.version for c in completions} == {0}
    spanning = [i for i, c in enumerate(completions) if c.last_version == 1]
    assert len(spanning) > len(completions) / 2
    for i in spanning:
        by_old = np.abs(completions[i].logprobs - old[i]) < 2e-4
        by_new = np.abs(completions[i].logprobs - new[i]) < 2e-4
        switch = int(np.argmin(by_old))  # the first that the old weights do not explain
        assert 0 < switch < len(by_old)
        assert by_new[switch:].all()


def test_a_bad_push_in_flight_stops_what_is_being_sampled(models, monkeypatch):
    generator = build(models["untied"], in_flight_updates=True)
    learner, probe_ids = learner_of(models["untied"]), probe_of(models["untied"])
    prompts = prompts_of(models["untied"], 8)
    push(generator, learner, probe_ids)
    perturb(learner, 1)
    errors, step = [], generator._engine.step

    def slowly():
        time.sleep(0.02)
        return step()

    def sample():
        try:
            sampled(generator, prompts, samples=8, after_push=1)
        except SyncError as error:
            errors.append(str(error))

    monkeypatch.setattr(generator._engine, "step", slowly)
    sampling = threading.Thread(target=sample)
    sampling.start()
    time.sleep(0.15)
    with pytest.raises(SyncError, match="probe differs"):
        push(generator, learner, probe_ids, limit=-1.0)
    sampling.join(60)
    assert len(errors) == 1
    assert errors[0].startswith("does not sample: it holds version 1, but its probe differs")
    assert not generator._finished
    assert not generator._engine.has_unfinished_requests()
    push(generator, learner, probe_ids)
    assert {c.version for c in sampled(generator, prompts, after_push=3)} == {1}


def test_what_a_refuted_push_wrote_is_not_saved_by_a_later_one(models, monkeypatch):
    """The bad push and the good one come between two steps of the thread that samples."""
    generator = build(models["untied"], in_flight_updates=True)
    learner, probe_ids = learner_of(models["untied"]), probe_of(models["untied"])
    prompts = prompts_of(models["untied"], 4)
    push(generator, learner, probe_ids)
    step, taken = generator._engine.step, []

    def interrupted():
        taken.append(1)
        if len(taken) == 5:  # as another thread's refutation and recovery would leave it
            generator._standing.refuted += 1
        return step()

    monkeypatch.setattr(generator._engine, "step", interrupted)
    with pytest.raises(SyncError, match="a push that came in meanwhile was refuted"):
        sampled(generator, prompts, samples=2, after_push=1)
    assert not generator._finished
    monkeypatch.undo()
    assert len(sampled(generator, prompts, samples=2, after_push=1)) == 8


def test_a_rest_is_over_with_the_next_call(engines, models):
    generator, learner = engines("untied"), learner_of(models["untied"])
    push(generator, learner, probe_of(models["untied"]))
    before = sampled(generator, prompts_of(models["untied"], 4))
    generator.rest()
    after = sampled(generator, prompts_of(models["untied"], 4))
    assert [c.ids.tolist() for c in after] == [c.ids.tolist() for c in before]


# --- adapters, precision, arguments ----------------------------------------------------------


def test_a_lora_push_is_the_adapter_alone_loaded_in_place(models):
    lora = {"lora": {"rank": 4, "alpha": 8.0}}
    generator = build(models["untied"], policy=lora)
    learner = learner_of(models["untied"], **lora)
    base = learner_of(models["untied"]).weights()
    probe_ids, prompts = probe_of(models["untied"]), prompts_of(models["untied"], 4)
    seen = []
    for version in (0, 1, 2):
        if version:
            perturb(learner, version, by=0.3)
        assert push(generator, learner, probe_ids).gap < 1e-4
        greedy = [generator.probe(p.ids, NEW_TOKENS) for p in prompts]
        expected = [learner.probe(p.ids, NEW_TOKENS) for p in prompts]
        assert [g.ids.tolist() for g in greedy] == [e.ids.tolist() for e in expected]
        seen.append([g.ids.tolist() for g in greedy])
    assert seen[0] != seen[1] != seen[2]
    sizes = [sum(bucket.size for bucket in p.buckets) for p in (learner.weights(), base)]
    assert sizes[0] < sizes[1] / 4


def test_in_bfloat16_the_gap_is_bounded_by_config(models):
    generator = build(models["untied"], dtype="bfloat16")
    learner = learner_of(models["untied"])
    learner._push_dtype = torch.bfloat16
    probe_ids = probe_of(models["untied"])
    with pytest.raises(
        SyncError, match=r"its probe differs from the learner's by .* .limit 0.001."
    ):
        push(generator, learner, probe_ids, limit=1e-3)
    policy = PolicyOptions(model=str(models["untied"]))
    limit = GeneratorOptions(backend="vllm", dtype="bfloat16").gap_limit(policy)
    assert 1e-3 < push(generator, learner, probe_ids, limit).gap < limit
    whole = learner_of(models["untied"]).weights().buckets
    assert 2 * learner.weights().buckets[0].size == whole[0].size


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"max_num_seq": 3}, "generator.engine.max_num_seq: no engine argument of .*max_num_seqs?"),
        ({"dtype": "half"}, "generator.engine.dtype: is set by generator.dtype; set that instead"),
        ({"seed": 1}, "generator.engine.seed: exact log-probabilities and verified pushes need"),
    ],
)
def test_engine_arguments_that_cannot_be_are_one_line(engine, said):
    with pytest.raises(UserError, match=said) as refused:
        refuse_unknown_arguments(engine, ["max_num_seqs", "dtype", "seed"])
    assert "\n" not in str(refused.value)


def test_a_model_that_vllm_cannot_run_is_told_when_it_is_built(tiny_model):
    """The tiny model's heads are of 8 numbers: too few for vLLM's attention on the CPU."""
    said = r"^generator.backend=vllm: vLLM cannot run policy.model=.* \(Unsupported CPU attention"
    with pytest.raises(UserError, match=said) as refused:
        build(tiny_model)
    assert "\n" not in str(refused.value)


def test_speculation_hides_how_tokens_were_drawn(engines, models, monkeypatch):
    """vLLM's rejection sampler draws past the one that tells both log-probabilities."""
    worker = engines("untied")._engine.model_executor.driver_worker.worker
    monkeypatch.setattr(worker.model_runner, "speculative_config", object())
    assert worker.record_sampling_logprobs() is False


def test_what_vllm_itself_refuses_is_one_line(models):
    from workers.vllm_generator import VllmGenerator

    with pytest.raises(UserError, match=r"^generator.engine: vLLM refuses it: block_") as refused:
        VllmGenerator(
            PolicyOptions(model=str(models["untied"])),
            SamplingOptions(),
            GeneratorOptions(backend="vllm", engine={"block_size": "wide"}),
        )
    assert "\n" not in str(refused.value)
