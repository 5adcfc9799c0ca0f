"""Weights arrive byte for byte, or the run stops: buckets, receipts, probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.launch.crew import WorkerPlan
from pipeline.launch.inline import InlineHandle
from pipeline.learner import RemoteLearner
from pipeline.replica import Replica
from pipeline.sync import WeightSync
from tests import tiny
from workers.generator import SampleRequest, SamplingOptions
from workers.learner.learner import Learner
from workers.learner.options import LearnerOptions
from workers.learner.pairwise_options import DpoOptions
from workers.messages import (
    BatchCompletion,
    BatchPair,
    Completion,
    IntArray,
    Prompt,
    UpdateBatch,
)
from workers.options import PolicyOptions
from workers.transformers_generator import TransformersGenerator
from workers.weight_sync.buckets import (
    BUCKET_BYTES,
    Carried,
    Receipt,
    SyncError,
    WeightPush,
    arriving,
    checksum_of,
    device_checksum,
    pack,
    receipt_of,
    unpack_into,
)
from workers.weight_sync.transport import ObjectStore, push_of

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)


def tensors() -> dict[str, torch.Tensor]:
    """A scalar, a vector, a matrix, nothing at all: 4 + 6 + 48 + 0 + 3 bytes.

    Six bytes of nothing stand before the matrix, whose place is a multiple of eight.
    """
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


def push(
    held: dict[str, torch.Tensor], version: int = 0, bucket_bytes: int = BUCKET_BYTES
) -> WeightPush:
    """The tensors, their bytes in the push itself."""
    return push_of(version, pack(held, bucket_bytes=bucket_bytes), ObjectStore())


def copy_of(sent: WeightPush) -> WeightPush:
    """The push as another process gets it: its own bytes, writable."""
    return dataclasses.replace(sent, source=Carried(tuple(d.copy() for d in sent.source.data)))


# --- buckets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (1 << 20, [["scalar", "half", "matrix", "empty", "flags"]]),
        (64, [["scalar", "half", "matrix", "empty"], ["flags"]]),
        (63, [["scalar", "half"], ["matrix", "empty", "flags"]]),
        (10, [["scalar", "half"], ["matrix"], ["empty", "flags"]]),
        # A tensor larger than a bucket has one to itself. What holds nothing fits anywhere.
        (1, [["scalar"], ["half"], ["matrix"], ["empty"], ["flags"]]),
    ],
)
def test_buckets_hold_consecutive_tensors(bucket_bytes, expected):
    packed = pack(tensors(), bucket_bytes=bucket_bytes)
    assert [[slot.name for slot in bucket.slots] for bucket, _ in packed] == expected
    sizes = {"scalar": 4, "half": 6, "matrix": 48, "empty": 0, "flags": 3}
    aligned = {"scalar": 4, "half": 2, "matrix": 8, "empty": 4, "flags": 1}
    for bucket, data in packed:
        end = 0
        for slot in bucket.slots:
            assert slot.size == sizes[slot.name]
            assert slot.offset % aligned[slot.name] == 0
            assert 0 <= slot.offset - end < 8
            end = slot.offset + slot.size
        assert len(data) == bucket.size == end


def test_a_bucket_is_the_tensors_bytes():
    ((_, data),) = pack({"b": torch.tensor(True), "a": torch.tensor([1, 256])})
    eight = [(1).to_bytes(8, "little"), (256).to_bytes(8, "little")]
    assert bytes(data.numpy()) == b"\x01" + 7 * b"\x00" + b"".join(eight)


def test_tensors_can_travel_in_another_precision():
    ((bucket, data),) = pack(
        {"w": torch.tensor([1.0, -2.5]), "step": torch.tensor([7])}, torch.bfloat16
    )
    # bfloat16 is the upper half of a float32: 1.0 = 3f80 0000, -2.5 = c020 0000.
    assert bytes(data.numpy()) == bytes.fromhex("803f20c0000000000700000000000000")
    assert [slot.dtype for slot in bucket.slots] == ["bfloat16", "int64"]


def test_the_device_checksum_tells_words_and_their_places_apart():
    """Recomputed in Python's own integers."""

    def by_hand(data: bytes) -> str:
        padded = data + bytes(-len(data) % 8)
        total = len(data)
        for i in range(len(padded) // 8):
            word = int.from_bytes(padded[8 * i : 8 * i + 8], "little")
            mixed = word * 0x9E3779B97F4A7C15 % 2**64
            signed = mixed - 2**64 if mixed >> 63 else mixed
            total += (mixed ^ (signed >> 32) % 2**64) * (2 * i + 1)
        return f"{total % 2**64:016x}"

    data = np.random.default_rng(0).integers(0, 256, 1003, dtype=np.uint8)
    assert device_checksum(torch.from_numpy(data)) == by_hand(data.tobytes())
    swapped = data.copy()
    swapped[:8], swapped[8:16] = data[8:16].copy(), data[:8].copy()
    longer = np.append(data, np.uint8(0))
    found = {device_checksum(torch.from_numpy(d)) for d in (data, swapped, longer, data[:-1])}
    assert len(found) == 4


@pytest.mark.parametrize("bucket_bytes", [1, 7, 10, 57, 1 << 20])
def test_a_round_trip_keeps_every_byte(bucket_bytes):
    sent = tensors() | {"transposed": torch.arange(6.0).view(2, 3).T, "nan": torch.tensor([np.nan])}
    sent_push = push(sent, 1, bucket_bytes)
    held = blank(sent)
    unpack_into(sent_push, held)
    for name in sent:
        assert torch.equal(held[name], sent[name]) or name == "nan"
        assert held[name].dtype == sent[name].dtype
    assert held["nan"].isnan().all()
    assert receipt_of(held, sent_push) == Receipt(1, sent_push.checksum)


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
    sent_push = push(sent, seed, bucket_bytes)
    held = {name: torch.ones_like(tensor) for name, tensor in sent.items()}
    unpack_into(sent_push, held)
    assert all(same_bytes(held[name], sent[name]) for name in sent)
    assert receipt_of(held, sent_push) == Receipt(seed, sent_push.checksum)
    for bucket in sent_push.buckets:
        assert bucket.size <= bucket_bytes or len(bucket.slots) == 1


def test_the_checksum_covers_the_buckets_in_order():
    one, other = torch.tensor([1.0]), torch.tensor([2.0])
    straight = push({"a": one, "b": other}, bucket_bytes=4)
    swapped = push({"a": other, "b": one}, bucket_bytes=4)
    assert {b.checksum for b in straight.buckets} == {b.checksum for b in swapped.buckets}
    assert straight.checksum != swapped.checksum


@settings(deadline=None, max_examples=60)
@given(
    bucket_bytes=st.sampled_from([1, 10, 1 << 20]), place=st.integers(0, 60), bit=st.integers(0, 7)
)
def test_any_flipped_bit_is_refused_and_its_bucket_not_copied(bucket_bytes, place, bit):
    sent = push(tensors(), 5, bucket_bytes)
    arrived = copy_of(sent)
    data = arrived.source.data
    index, offset = 0, place
    while offset >= len(data[index]):
        offset -= len(data[index])
        index += 1
    data[index][offset] ^= 1 << bit
    assert checksum_of(torch.from_numpy(data[index])) != sent.buckets[index].checksum

    held = blank(tensors())
    with pytest.raises(SyncError, match=f"version 5: bucket {index} arrived corrupted"):
        unpack_into(arrived, held)
    refused = {slot.name for bucket in sent.buckets[index:] for slot in bucket.slots}
    assert not any(held[name].any() for name in refused)


def test_names_that_differ_are_named_and_nothing_is_copied():
    sent = push({"a": torch.ones(2), "lm_head": torch.ones(3)}, version=2)
    held = {"a": torch.zeros(2), "norm": torch.zeros(3)}
    said = r"version 2: tensors missing \['norm'\], unknown \['lm_head'\]"
    with pytest.raises(SyncError, match=said):
        unpack_into(sent, held)
    assert not held["a"].any()


def test_a_lost_bucket_is_refused():
    sent = push({"a": torch.ones(2), "b": torch.ones(3)}, version=2, bucket_bytes=1)
    held = {"a": torch.zeros(2), "b": torch.zeros(3)}
    torn = dataclasses.replace(sent, buckets=sent.buckets[:1])
    with pytest.raises(SyncError, match=r"tensors missing \['b'\], unknown \[\]"):
        unpack_into(torn, held)
    with pytest.raises(SyncError, match="version 2: lists 1 buckets, which are not those"):
        list(arriving(torn))
    lost = dataclasses.replace(sent, source=Carried(sent.source.data[:1]))
    with pytest.raises(SyncError, match="version 2: 1 of 2 buckets came"):
        unpack_into(lost, held)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (7,), ()])
def test_another_shape_is_named_and_nothing_is_copied(shape):
    sent = push({"a": torch.ones(2), "layer.weight": torch.ones(2, 3)}, version=4)
    held = {"a": torch.zeros(2), "layer.weight": torch.zeros(shape)}
    said = "version 4: layer.weight has shape .2, 3., the generator's has " + str(shape).replace(
        "(", r"\("
    ).replace(")", r"\)")
    with pytest.raises(SyncError, match=said):
        unpack_into(sent, held)
    assert not held["a"].any()


def test_a_receipt_is_of_the_tensors_as_they_stand():
    sent = push(tensors(), 9, bucket_bytes=10)
    held = blank(tensors())
    unpack_into(sent, held)
    assert receipt_of(held, sent) == Receipt(9, sent.checksum)
    for name in ("scalar", "half", "matrix", "flags"):
        stale = held | {name: torch.zeros_like(held[name])}
        assert receipt_of(stale, sent).checksum != sent.checksum, name


def test_a_receipt_shows_weights_kept_in_another_precision():
    sent = push({"a": torch.tensor([1.0, 2.0])})
    held = {"a": torch.zeros(2, dtype=torch.bfloat16)}
    unpack_into(sent, held)
    assert held["a"].tolist() == [1.0, 2.0]
    assert receipt_of(held, sent).checksum != sent.checksum


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


GAP_LIMIT = 1e-3


def sync_of(generators: Sequence[Any], probe_ids: IntArray) -> WeightSync:
    both = [Replica(i, g, probe_ids, GAP_LIMIT) for i, g in enumerate(generators)]
    return WeightSync(both, probe_ids)


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
    sync = sync_of(generators, probe_ids)
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
    sync = sync_of(generators, probe_ids)
    sync.push(learner)
    sync.prove(0)
    learn(learner, sample(generators[0]))

    class Deaf:
        def submit(self, method: str, *args: Any) -> Any:
            if method == "load":
                generators[1]._hosted.worker._standing.received = learner.sent().result()
                return learner.sent()
            return generators[1].submit(method, *args)

        def restart(self) -> None:
            """It is as deaf as before."""

    deaf = sync_of([generators[0], Deaf()], probe_ids)
    deaf.push(learner)
    with pytest.raises(SyncError, match="generator 1 holds version 1, but its probe differs"):
        deaf.prove(1)


def test_a_corrupted_push_is_refused_and_nothing_sampled_until_the_next(workers):
    learner, (generator, _), probe_ids = workers
    sync_of([generator], probe_ids).push(learner)
    before = sample(generator)
    learn(learner, before)
    arrived = copy_of(learner.weights(0).result())
    arrived.source.data[0][-1] ^= 1
    with pytest.raises(SyncError, match="version 1: bucket 0 arrived corrupted"):
        generator.submit("load", arrived).result()
    with pytest.raises(SyncError, match="does not sample: it weight push of version 1: bucket 0"):
        sample(generator)
    sync_of([generator], probe_ids).push(learner)
    assert {c.version for c in sample(generator)} == {1}


def test_weights_of_another_model_are_refused(workers, tmp_path):
    _, (generator, _), _ = workers
    other = tiny.save_model(tmp_path / "other", words=tiny.WORDS[:-1])
    learner = Learner(PolicyOptions(model=str(other)), LearnerOptions(), DpoOptions(), updates=1)
    with pytest.raises(SyncError, match=r"embed_tokens.weight has shape \(23, 32\).*\(24, 32\)"):
        generator.submit("load", learner.weights()).result()
