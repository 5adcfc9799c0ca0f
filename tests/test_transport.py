"""Buckets over process groups: what was published is what arrives, whoever asks, however often."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest
import torch

from workers.weight_sync import process_group
from workers.weight_sync.buckets import Receipt, SyncError, arriving, pack, receipt_of, unpack_into
from workers.weight_sync.process_group import GroupSource, GroupTransport, own_address
from workers.weight_sync.staging import Staging
from workers.weight_sync.transport import ObjectStore, build_transport, push_of


def tensors(version: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(version)
    return {f"layer.{i}": torch.randn(7, 11, generator=noise) for i in range(5)}


def published(transport: GroupTransport, version: int, bucket_bytes: int = 700):
    """Five tensors of 308 bytes, two to a bucket."""
    packed = pack(tensors(version), bucket_bytes=bucket_bytes)
    assert len(packed) == 3
    return push_of(version, packed, transport)


def received(push) -> dict[str, torch.Tensor]:
    held = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    unpack_into(push, held)
    assert receipt_of(held, push) == Receipt(push.version, push.checksum)
    return held


def same(held, version: int) -> bool:
    return all(torch.equal(held[name], tensor) for name, tensor in tensors(version).items())


@pytest.fixture
def transport():
    return GroupTransport("gloo")


def test_any_version_can_be_had_in_any_order_until_it_is_released(transport):
    pushes = {version: published(transport, version) for version in (3, 4, 5)}
    for version in (4, 3, 5, 4):
        assert same(received(pushes[version]), version)
    transport.release(below=4)
    with pytest.raises(SyncError, match=r"version 3: the learner no longer has it$"):
        received(pushes[3])
    assert same(received(pushes[4]), 4)


def test_the_same_tensors_make_the_same_push_by_every_transport(transport):
    by_store = push_of(1, pack(tensors(1), bucket_bytes=700), ObjectStore())
    by_gloo = published(transport, 1)
    assert (by_store.buckets, by_store.checksum) == (by_gloo.buckets, by_gloo.checksum)
    assert same(received(by_store), 1)


def test_a_receiver_that_turned_away_asks_anew(transport):
    """Half a push read, then another asked for: nothing of the first is taken for the second."""
    first, second = published(transport, 1), published(transport, 2)
    half = arriving(first)
    next(half)
    half.close()
    assert same(received(second), 2)


def test_bytes_changed_on_their_way_are_refused(transport):
    packed = pack(tensors(1), bucket_bytes=700)
    push = push_of(1, packed, transport)
    packed[1][1][5] ^= 4
    with pytest.raises(SyncError, match="version 1: bucket 1 arrived corrupted"):
        received(push)
    packed[1][1][5] ^= 4
    assert same(received(push), 1)


def ask(push, answers, die: bool) -> None:
    """In a process of its own: receive, then wait to be killed if asked to."""
    answers.put(same(received(push), push.version))
    if die:
        signal.pause()


def test_receivers_in_other_processes_that_come_and_go(transport):
    """Two at one time; one is killed with its group open; a third asks; none waits for another."""
    push = published(transport, 6)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    first, second = (
        context.Process(target=ask, args=(push, answers, die), daemon=True) for die in (True, False)
    )
    first.start()
    second.start()
    assert [answers.get(timeout=60) for _ in range(2)] == [True, True]
    second.join(20)
    os.kill(first.pid, signal.SIGKILL)
    first.join(20)
    later = published(transport, 7)
    assert same(received(later), 7)


def test_a_learner_that_is_not_there_is_an_error_with_its_address(monkeypatch):
    monkeypatch.setattr(process_group, "ANSWER_WITHIN", process_group.timedelta(seconds=2))
    gone = GroupTransport("gloo")
    push = published(gone, 1)
    nobody = GroupSource("gloo", "127.0.0.1", 1)
    with pytest.raises(SyncError, match=r"did not come over gloo from 127.0.0.1:1 \("):
        list(nobody.fetch(push.version, [8]))


def test_the_learner_does_not_wait_for_receivers(transport):
    """Publishing returns although nobody ever asks, and serving happens on other threads."""
    before = threading.active_count()
    for version in range(4):
        published(transport, version)
    assert threading.active_count() == before


def test_the_address_is_one_that_can_be_connected_to():
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address().count(".") == 3


def test_memory_is_used_again_only_once_its_version_is_released():
    staging = Staging("cpu")
    first = [staging.take(1, size) for size in (8, 16)]
    second = staging.take(2, 8)
    assert second.data_ptr() not in {data.data_ptr() for data in first}
    staging.release(below=1)
    assert staging.take(3, 16).data_ptr() != first[1].data_ptr()
    staging.release(below=2)
    assert staging.take(4, 16).data_ptr() == first[1].data_ptr()
    assert staging.take(4, 24).numel() == 24
    assert staging.take(4, 8).data_ptr() == first[0].data_ptr()


def test_what_lay_in_used_memory_before_does_not_show():
    """Between a tensor of one byte and one of eight lie seven that are always nothing."""
    held = {"flag": torch.tensor(True), "eight": torch.tensor([5])}
    used = torch.full((16,), 255, dtype=torch.uint8)
    ((again, data),) = pack(held, allocate=lambda _: used)
    assert bytes(data.numpy()) == b"\x01" + bytes(7) + (5).to_bytes(8, "little")
    ((new, _),) = pack(held)
    assert again == new


def test_names_are_transports():
    assert isinstance(build_transport("object_store"), ObjectStore)
    assert isinstance(build_transport("gloo"), GroupTransport)
