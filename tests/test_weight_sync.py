"""Weights arrive byte for byte, or the run stops: buckets, receipts, probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.launch.crew import WorkerPlan
from pipeline.launch.inline import InlineHandle
from pipeline.learner import RemoteLearner
from pipeline.sync import GAP_LIMIT, PROBE_NEW_TOKENS, WeightSync, probe_gap
from tests import tiny
from workers.generator import SampleRequest, SamplingOptions
from workers.learner.learner import Learner
from workers.learner.options import LearnerOptions
from workers.learner.pairwise_options import DpoOptions
from workers.messages import (
    BatchCompletion,
    BatchPair,
    Completion,
    Prompt,
    UpdateBatch,
    probe_completion,
)
from workers.options import PolicyOptions
from workers.transformers_generator import TransformersGenerator
from workers.weight_sync.buckets import (
    Receipt,
    SyncError,
    WeightPush,
    checksum_of,
    pack,
    receipt_of,
    unpack_into,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)


def tensors() -> dict[str, torch.Tensor]:
    """A scalar, a vector, a matrix, nothing at all: 4 + 6 + 48 + 0 + 3 bytes, odd offsets."""
    return {
        "scalar": torch.tensor(1.5),
        "half": torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16),
        "matrix": torch.arange(6, dtype=torch.float64).view(2, 3) / 7,
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
    }


def blank(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bytes(one.view(-1).view(torch.uint8).numpy())
        == bytes(other.view(-1).view(torch.uint8).numpy())
    )


def copy_of(push: WeightPush) -> WeightPush:
    """The push as another process gets it: its own bytes, writable."""
    buckets = tuple(dataclasses.replace(b, data=b.data.copy()) for b in push.buckets)
    return dataclasses.replace(push, buckets=buckets)


# --- buckets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (1 << 20, [["scalar", "half", "matrix", "empty", "flags"]]),
        (58, [["scalar", "half", "matrix", "empty"], ["flags"]]),
        (57, [["scalar", "half"], ["matrix", "empty", "flags"]]),
        (10, [["scalar", "half"], ["matrix"], ["empty", "flags"]]),
        # A tensor larger than a bucket has one to itself. What holds nothing fits anywhere.
        (1, [["scalar"], ["half"], ["matrix"], ["empty"], ["flags"]]),
    ],
)
def test_buckets_hold_consecutive_tensors(bucket_bytes, expected):
    push = pack(tensors(), version=3, bucket_bytes=bucket_bytes)
    assert push.version == 3
    assert [[slot.name for slot in bucket.slots] for bucket in push.buckets] == expected
    sizes = {"scalar": 4, "half": 6, "matrix": 48, "empty": 0, "flags": 3}
    for bucket in push.buckets:
        offset = 0
        for slot in bucket.slots:
            assert (slot.offset, slot.size) == (offset, sizes[slot.name])
            offset += slot.size
        assert len(bucket.data) == offset


def test_a_bucket_is_the_tensors_bytes():
    (bucket,) = pack({"a": torch.tensor([1, 256]), "b": torch.tensor(True)}, version=0).buckets
    assert bytes(bucket.data) == (1).to_bytes(8, "little") + (256).to_bytes(8, "little") + b"\x01"


@pytest.mark.parametrize("bucket_bytes", [1, 7, 10, 57, 1 << 20])
def test_a_round_trip_keeps_every_byte(bucket_bytes):
    sent = tensors() | {"transposed": torch.arange(6.0).view(2, 3).T, "nan": torch.tensor([np.nan])}
    push = pack(sent, version=1, bucket_bytes=bucket_bytes)
    held = blank(sent)
    unpack_into(push, held)
    for name in sent:
        assert torch.equal(held[name], sent[name]) or name == "nan"
        assert held[name].dtype == sent[name].dtype
    assert held["nan"].isnan().all()
    assert receipt_of(held, push) == Receipt(1, push.checksum)


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    bucket_bytes=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
def test_any_tensors_make_the_round_trip(shapes, bucket_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    sent = {
        f"t{i}": torch.randint(-90, 90, shape, generator=generator).to(dtype)
        for i, (dtype, shape) in enumerate(shapes)
    }
    push = pack(sent, version=seed, bucket_bytes=bucket_bytes)
    held = {name: torch.ones_like(tensor) for name, tensor in sent.items()}
    unpack_into(push, held)
    assert all(same_bytes(held[name], sent[name]) for name in sent)
    assert receipt_of(held, push) == Receipt(seed, push.checksum)
    for bucket in push.buckets:
        assert len(bucket.data) <= bucket_bytes or len(bucket.slots) == 1


def test_the_checksum_covers_the_buckets_in_order():
    one, other = torch.tensor([1.0]), torch.tensor([2.0])
    push = pack({"a": one, "b": other}, version=0, bucket_bytes=4)
    swapped = pack({"a": other, "b": one}, version=0, bucket_bytes=4)
    assert {b.checksum for b in push.buckets} == {b.checksum for b in swapped.buckets}
    assert push.checksum != swapped.checksum


@settings(deadline=None, max_examples=60)
@given(
    bucket_bytes=st.sampled_from([1, 10, 1 << 20]), place=st.integers(0, 60), bit=st.integers(0, 7)
)
def test_any_flipped_bit_is_refused_and_nothing_is_copied(bucket_bytes, place, bit):
    push = pack(tensors(), version=5, bucket_bytes=bucket_bytes)
    arrived = copy_of(push)
    flipped = np.concatenate([b.data for b in arrived.buckets])
    assert len(flipped) == 61
    index, offset = 0, place
    while offset >= len(arrived.buckets[index].data):
        offset -= len(arrived.buckets[index].data)
        index += 1
    arrived.buckets[index].data[offset] ^= 1 << bit
    assert checksum_of(arrived.buckets[index].data) != push.buckets[index].checksum

    held = blank(tensors())
    with pytest.raises(SyncError, match=f"version 5: bucket {index} arrived corrupted"):
        unpack_into(arrived, held)
    assert not any(tensor.any() for tensor in held.values())


def test_names_that_differ_are_named_and_nothing_is_copied():
    push = pack({"a": torch.ones(2), "lm_head": torch.ones(3)}, version=2)
    held = {"a": torch.zeros(2), "norm": torch.zeros(3)}
    said = r"version 2: tensors missing \['norm'\], unknown \['lm_head'\]"
    with pytest.raises(SyncError, match=said):
        unpack_into(push, held)
    assert not held["a"].any()


def test_a_lost_bucket_is_refused():
    push = pack({"a": torch.ones(2), "b": torch.ones(3)}, version=2, bucket_bytes=1)
    torn = dataclasses.replace(push, buckets=push.buckets[:1])
    with pytest.raises(SyncError, match=r"tensors missing \['b'\], unknown \[\]"):
        unpack_into(torn, {"a": torch.zeros(2), "b": torch.zeros(3)})


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (7,), ()])
def test_another_shape_is_named_and_nothing_is_copied(shape):
    push = pack({"a": torch.ones(2), "layer.weight": torch.ones(2, 3)}, version=4)
    held = {"a": torch.zeros(2), "layer.weight": torch.zeros(shape)}
    said = "version 4: layer.weight has shape .2, 3., the generator's has " + str(shape).replace(
        "(", r"\("
    ).replace(")", r"\)")
    with pytest.raises(SyncError, match=said):
        unpack_into(push, held)
    assert not held["a"].any()


def test_a_receipt_is_of_the_tensors_as_they_stand():
    push = pack(tensors(), version=9, bucket_bytes=10)
    held = blank(tensors())
    unpack_into(push, held)
    assert receipt_of(held, push) == Receipt(9, push.checksum)
    for name in ("scalar", "half", "matrix", "flags"):
        stale = held | {name: torch.zeros_like(held[name])}
        assert receipt_of(stale, push).checksum != push.checksum, name


def test_a_receipt_shows_weights_kept_in_another_precision():
    sent = {"a": torch.tensor([1.0, 2.0])}
    push = pack(sent, version=0)
    held = {"a": torch.zeros(2, dtype=torch.bfloat16)}
    unpack_into(push, held)
    assert held["a"].tolist() == [1.0, 2.0]
    assert receipt_of(held, push).checksum != push.checksum


# --- the proof, with workers that lie --------------------------------------------------------


class Result:
    """A future; an exception among the values is raised where it is asked for."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


PROBE = np.arange(150)


def continuation(version: int, ids: list[int], logprobs: list[float]) -> Completion:
    return probe_completion(version, ids, logprobs)


class FakeLearner:
    """A learner whose weights are its version and whose probe says so."""

    def __init__(self) -> None:
        self.version = 0
        self.calls: list[str] = []

    def submit(self, method: str, *args: object) -> Result:
        self.calls.append(method)
        if method == "update":
            self.version += 1
            return Result({})
        if method == "weights":
            return Result(push_of(self.version))
        if method == "sent":
            return Result(Receipt(self.version, push_of(self.version).checksum))
        assert method == "probe"
        assert args[0] is PROBE
        assert args[1] == PROBE_NEW_TOKENS
        return Result(continuation(self.version, [1, 2, 3, 4], logprobs_of(self.version)))


def push_of(version: int) -> WeightPush:
    return pack({"w": torch.tensor([float(version)])}, version)


def logprobs_of(version: int) -> list[float]:
    return [-1.0 - version, -2.0, -3.0, -4.0]


class FakeGenerator:
    """An honest generator; the subclasses below are not."""

    gap = 0.0

    def __init__(self) -> None:
        self.version = -1
        self.weights = {"w": torch.tensor([-1.0])}
        self.calls: list[str] = []

    def submit(self, method: str, *args: Any) -> Result:
        self.calls.append(method)
        if method == "load":
            return Result(self.load(args[0].result()))
        assert method == "probe"
        return Result(self.probe())

    def load(self, push: WeightPush) -> Receipt:
        unpack_into(push, self.weights)
        self.version = push.version
        return receipt_of(self.weights, push)

    def probe(self) -> Completion:
        logprobs = logprobs_of(int(self.weights["w"].item()))
        logprobs[2] += self.gap
        return continuation(self.version, [1, 2, 3, 4], logprobs)


class Lazy(FakeGenerator):
    """Says it loaded, and keeps what it had."""

    def load(self, push: WeightPush) -> Receipt:
        return receipt_of(self.weights, push)


class Behind(FakeGenerator):
    """Has the bytes, but counts another version."""

    def load(self, push: WeightPush) -> Receipt:
        return dataclasses.replace(super().load(push), version=push.version - 1)


class Cached(FakeGenerator):
    """Has the weights, and samples from something else."""

    gap = 1.5 * GAP_LIMIT


class NotANumber(FakeGenerator):
    gap = float("nan")


class Close(FakeGenerator):
    gap = 0.5 * GAP_LIMIT


class Drifting(FakeGenerator):
    """Further from the learner with every version: each proof has its own gap."""

    def load(self, push: WeightPush) -> Receipt:
        self.gap = (push.version + 1) * GAP_LIMIT / 4
        return super().load(push)


def learner_and_sync(*generators: FakeGenerator) -> tuple[RemoteLearner, WeightSync, FakeLearner]:
    fake = FakeLearner()
    return RemoteLearner(fake), WeightSync(generators, PROBE), fake


@pytest.mark.parametrize(
    ("liar", "said"),
    [
        (Lazy, "generator 1 answered a push of version 0 .checksum {sent}. with version 0 "),
        (Behind, "generator 1 answered a push of version 0 .* with version -1 .checksum {sent}.$"),
        (
            Cached,
            r"generator 1 holds version 0, but .* by 0\.0015 nats a token .limit 0\.001.",
        ),
        (NotANumber, "generator 1 holds version 0, but its probe .* by nan nats"),
    ],
)
def test_a_generator_that_did_not_take_the_weights_is_named(liar, said):
    learner, sync, _ = learner_and_sync(FakeGenerator(), liar(), FakeGenerator())
    sync.push(learner)
    with pytest.raises(SyncError, match=said.format(sent=push_of(0).checksum)):
        sync.prove(0)


def test_the_gap_is_the_largest_over_the_generators_and_is_remembered():
    learner, sync, _ = learner_and_sync(FakeGenerator(), Close(), FakeGenerator())
    sync.push(learner)
    assert sync.prove(0) == pytest.approx(0.5 * GAP_LIMIT, rel=1e-3)
    assert sync.prove(0) == pytest.approx(0.5 * GAP_LIMIT, rel=1e-3)
    honest, all_honest, _ = learner_and_sync(FakeGenerator())
    all_honest.push(honest)
    assert all_honest.prove(0) == 0.0


def test_an_unchanged_version_is_not_sent_again():
    generator = FakeGenerator()
    learner, sync, fake = learner_and_sync(generator)
    sync.push(learner)
    sync.push(learner)
    sync.prove(0)
    sync.push(learner)
    assert generator.calls == ["load", "probe"]
    assert fake.calls == ["weights", "sent", "probe"]
    learner.update(UpdateBatch((), ()))
    sync.push(learner)
    sync.push(learner)
    assert generator.calls == ["load", "probe"] * 2
    assert sync.prove(1) == 0.0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_pushes_wait_to_be_proved_in_either_order(order):
    learner, sync, _ = learner_and_sync(Drifting())
    sync.push(learner)
    learner.update(UpdateBatch((), ()))
    sync.push(learner)
    for version in order:
        assert sync.prove(version) == pytest.approx((version + 1) * GAP_LIMIT / 4, rel=1e-2)


@pytest.mark.parametrize(
    ("ids", "logprobs", "gap"),
    [
        ([5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0], 0.0),
        ([5, 6, 7, 8], [-1.0, -2.25, -3.0, -4.125], 0.25),
        # They part at the third token: a near tie there, nothing to compare afterwards.
        ([5, 6, 9, 8], [-1.0, -2.0, -3.125, -99.0], 0.125),
        ([5, 6, 9, 1], [-1.5, -2.0, -3.0, -99.0], 0.5),
        ([9, 6, 7, 8], [-1.0625, -99.0, -99.0, -99.0], 0.0625),
        # Another most likely token with another probability is no near tie.
        ([5, 9, 7, 8], [-1.0, -7.0, -3.0, -4.0], 5.0),
    ],
)
def test_continuations_are_compared_until_they_part(ids, logprobs, gap):
    expected = continuation(0, [5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0])
    assert probe_gap(continuation(0, ids, logprobs), expected) == gap


# --- the proof, with a real model ------------------------------------------------------------


def inline(build: Callable[[], Any]) -> InlineHandle:
    return InlineHandle(WorkerPlan("worker", build, threads=1, cpus=1))


@pytest.fixture
def workers(tiny_model):
    """A learner, two generators of the tiny model, and a probe of half its context."""
    policy = PolicyOptions(model=str(tiny_model))
    sampling = SamplingOptions(max_new_tokens=8)
    options = LearnerOptions(learning_rate=0.05)
    learner = inline(lambda: Learner(policy, options, DpoOptions(), 4))
    generators = [inline(lambda: TransformersGenerator(policy, sampling)) for _ in range(2)]
    return RemoteLearner(learner), generators, np.array([1, *(3 + np.arange(31) % 21)], np.int64)


def sample(generator: InlineHandle) -> list[Completion]:
    prompts = tuple(Prompt(i, np.array([1, 3 + i], np.int64), tiny.WORDS[3 + i]) for i in range(8))
    unit = generator.submit("sample", SampleRequest(prompts, 2, 0, "sampling")).result()
    return [completion for group in unit.completions for completion in group]


def learn(learner: RemoteLearner, completions: list[Completion]) -> None:
    """One update on the first completions of two prompts, contrasted with the second."""
    pairs = [(a, b) for a, b in zip(completions[::2], completions[1::2], strict=True)]
    items = [BatchCompletion(np.array([1, 3 + c.position], np.int64), c) for p in pairs for c in p]
    batch = UpdateBatch(
        tuple(items), tuple(BatchPair(2 * i, 2 * i + 1, 1.0) for i in range(len(pairs)))
    )
    (scores,) = learner.score_reference([batch])
    scored = tuple(
        dataclasses.replace(
            item, completion=dataclasses.replace(item.completion, reference_logprobs=logprobs)
        )
        for item, logprobs in zip(items, scores, strict=True)
    )
    learner.update(UpdateBatch(scored, batch.examples))


def test_a_push_after_an_update_changes_what_is_sampled(workers):
    learner, generators, probe_ids = workers
    sync = WeightSync(generators, probe_ids)
    sync.push(learner)
    assert 0.0 <= sync.prove(0) < 1e-4
    before = sample(generators[0])
    assert [c.ids.tolist() for c in sample(generators[1])] == [c.ids.tolist() for c in before]

    learn(learner, before)
    still = sample(generators[0])
    assert [c.logprobs.tolist() for c in still] == [c.logprobs.tolist() for c in before]

    sync.push(learner)
    assert 0.0 <= sync.prove(1) < 1e-4
    after = sample(generators[0])
    assert [c.seed for c in after] == [c.seed for c in before]
    assert {c.version for c in before} == {0}
    assert {c.version for c in after} == {1}
    assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(after, before, strict=True))
    assert [c.ids.tolist() for c in sample(generators[1])] == [c.ids.tolist() for c in after]


def test_a_push_that_a_generator_misses_is_found_out(workers):
    """The receipt is faked: only the probe can tell that the weights are version 0's."""
    learner, generators, probe_ids = workers
    sync = WeightSync(generators, probe_ids)
    sync.push(learner)
    sync.prove(0)
    learn(learner, sample(generators[0]))

    class Deaf:
        def submit(self, method: str, *args: Any) -> Any:
            if method == "load":
                return learner.sent()
            return generators[1].submit(method, *args)

    deaf = WeightSync([generators[0], Deaf()], probe_ids)
    deaf.push(learner)
    with pytest.raises(SyncError, match="generator 1 holds version 1, but its probe differs"):
        deaf.prove(1)


def test_a_corrupted_push_is_refused_and_the_version_stays(workers):
    learner, (generator, _), probe_ids = workers
    WeightSync([generator], probe_ids).push(learner)
    before = sample(generator)
    learn(learner, before)
    arrived = copy_of(learner.weights().result())
    arrived.buckets[0].data[-1] ^= 1
    with pytest.raises(SyncError, match="version 1: bucket 0 arrived corrupted"):
        generator.submit("load", arrived)
    again = sample(generator)
    assert {c.version for c in again} == {0}
    assert [c.logprobs.tolist() for c in again] == [c.logprobs.tolist() for c in before]


def test_weights_of_another_model_are_refused(workers, tmp_path):
    _, (generator, _), _ = workers
    other = tiny.save_model(tmp_path / "other", words=tiny.WORDS[:-1])
    learner = Learner(PolicyOptions(model=str(other)), LearnerOptions(), DpoOptions(), updates=1)
    with pytest.raises(SyncError, match=r"embed_tokens.weight has shape \(23, 32\).*\(24, 32\)"):
        generator.submit("load", learner.weights())
