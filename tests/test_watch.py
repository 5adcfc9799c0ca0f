"""What is done about what is measured, of made-up panels and records."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipeline.brake import Brake
from pipeline.drift_options import DriftOptions
from pipeline.lesson import Lesson
from pipeline.resampling import RoundPlan, Share
from pipeline.resampling_options import EarlyOptions
from pipeline.staleness import Staleness
from pipeline.watch import Watch
from tests.lessons import lesson
from tests.record_helpers import an_update
from workers.generator import SamplingOptions
from workers.learner.needs import Needs
from workers.messages import Completion, Fate, Judgement, Pair, Prompt, PromptGroup, Round

SOUND: dict[str, Any] = {"kl_to_reference": 1.0, "entropy": 2.0, "judging": {"tie_rate": 0.1}}
GONE = SOUND | {"kl_to_reference": 9.0}
TOLD = "drift.{}.kl_to_reference: 9 is above 5"


def watch_of(early: dict[str, Any] | None = None, **thresholds: Any) -> Watch:
    options = DriftOptions.model_validate(thresholds)
    return Watch(Staleness(EarlyOptions(**(early or {}))), Brake(options))


def round_of(index: int, version: int, prompts: int = 8) -> Round:
    """A round of prompts with one pair each to learn from."""
    groups = tuple(_group(position, version) for position in range(prompts))
    return Round(index, version, groups, "judge", {})


def _group(position: int, version: int) -> PromptGroup:
    completions = tuple(
        Completion(
            position=position,
            sample=sample,
            seed=0,
            version=version,
            ids=np.array([3 + sample], np.int64),
            logprobs=np.zeros(1, np.float32),
            sampling_logprobs=None,
            finished=True,
            text="",
        )
        for sample in (0, 1)
    )
    judgement = Judgement(position, np.array([1.0, 0.0]), (None, None))
    pairs = (Pair(position, 0, 1, 1.0, Fate.LEARN),)
    return PromptGroup(Prompt(position, np.zeros(1, np.int64), ""), completions, judgement, pairs)


def lesson_of(round_: Round, updates: int = 4, shares: tuple[Share, ...] = ()) -> Lesson:
    """Two prompts to an update."""
    plan = RoundPlan(round_.index, updates, 0, len(round_.groups), shares)
    return lesson(plan, round_, SamplingOptions(prompts_per_update=2), Needs(), run_seed=0)


def done(watch: Watch) -> tuple[str | None, str | None, str | None]:
    """Why the round ended, the policy is to be reset, the run is to stop."""
    return (
        watch.ended,
        None if watch.resets is None else str(watch.resets),
        None if watch.stops is None else str(watch.stops),
    )


NOTHING_DONE = (None, None, None)
RESET_RECORD = an_update(pairs=0, tokens=0, **dict.fromkeys(("loss", "ess", "kl_from_sampler")))


def test_without_thresholds_nothing_is_told_or_done() -> None:
    watch, round_ = watch_of(), round_of(0, 0)
    watch.begin(round_, GONE)
    watch.update(an_update(loss=1e9), 1)
    assert done(watch) == NOTHING_DONE
    assert watch.record(lesson_of(round_), 4) == {
        "alarms": [],
        "resampling": {
            "planned_updates": 4,
            "updates": 4,
            "replayed_prompts": 0,
            "unused_pairs": 0,
            "ended_by": None,
        },
    }


def test_a_warning_is_told_and_nothing_else() -> None:
    watch, round_ = watch_of(warn={"kl_to_reference": 5}), round_of(0, 0)
    watch.begin(round_, GONE)
    for version in (1, 2, 3, 4):
        watch.update(an_update(), version)
        assert done(watch) == NOTHING_DONE
    assert watch.record(lesson_of(round_), 4)["alarms"] == [TOLD.format("warn")]


def test_a_threshold_is_told_once_a_round_with_the_value_that_passed_it_first() -> None:
    watch = watch_of(warn={"loss": 1, "kl_to_reference": 5})
    watch.begin(round_of(0, 0), GONE)
    for version, loss in ((1, 0.5), (2, 2.0), (3, 3.0)):
        watch.update(an_update(loss=loss), version)
    told = watch.record(lesson_of(round_of(0, 0)), 3)["alarms"]
    assert told == [TOLD.format("warn"), "drift.warn.loss: 2 is above 1"]
    watch.begin(round_of(1, 3), SOUND)
    watch.update(an_update(loss=4.0), 4)
    told = watch.record(lesson_of(round_of(1, 3)), 1)["alarms"]
    assert told == ["drift.warn.loss: 4 is above 1"]


def test_to_resample_the_round_ends_after_one_update() -> None:
    watch, round_ = watch_of(resample={"kl_to_reference": 5}), round_of(0, 0)
    watch.begin(round_, GONE)
    assert done(watch) == NOTHING_DONE  # one update is made in any case: else no run would end
    watch.update(an_update(), 1)
    assert done(watch) == (TOLD.format("resample"), None, None)
    told = watch.record(lesson_of(round_), 1)
    assert told["alarms"] == [TOLD.format("resample")]
    # Of eight pairs two were learned from.
    assert told["resampling"]["unused_pairs"] == 6
    assert told["resampling"]["ended_by"] == TOLD.format("resample")
    watch.begin(round_of(1, 1), SOUND)
    watch.update(an_update(), 2)
    assert done(watch) == NOTHING_DONE


def test_a_measure_of_an_update_ends_the_round_at_once() -> None:
    watch = watch_of(resample={"kl_from_sampler": 0.1})
    watch.begin(round_of(0, 0), SOUND)
    watch.update(an_update(kl_from_sampler=0.05), 1)
    assert watch.ended is None
    watch.update(an_update(kl_from_sampler=0.2), 2)
    assert watch.ended == "drift.resample.kl_from_sampler: 0.2 is above 0.1"


def test_a_round_that_ends_with_its_last_update_did_not_end_early() -> None:
    watch, round_ = watch_of(resample={"loss": 1}), round_of(0, 0)
    watch.begin(round_, SOUND)
    watch.update(an_update(loss=2.0), 4)
    told = watch.record(lesson_of(round_), 4)["resampling"]
    assert (told["ended_by"], told["unused_pairs"]) == (None, 0)


def test_stale_pairs_end_a_round_too_and_drift_is_named_before_them() -> None:
    stale = an_update(policy_ess=0.1, kl_from_sampler=3.0)
    watch = watch_of({"ess_below": 0.5}, resample={"kl_from_sampler": 1})
    watch.begin(round_of(0, 0), SOUND)
    watch.update(stale, 1)
    assert watch.ended == "drift.resample.kl_from_sampler: 3 is above 1"
    watch = watch_of({"ess_below": 0.5}, warn={"kl_from_sampler": 1})
    watch.begin(round_of(0, 0), SOUND)
    watch.update(stale, 1)
    assert watch.ended == "policy_ess 0.1 is below resampling.early.ess_below=0.5"


def test_a_reset_takes_the_place_of_the_next_update_and_ends_the_round() -> None:
    watch, round_ = watch_of(reset={"kl_to_reference": 5}), round_of(3, 6)
    watch.begin(round_, GONE)
    assert done(watch) == (None, TOLD.format("reset"), None)
    watch.update(RESET_RECORD, 7)
    assert done(watch) == (TOLD.format("reset"), None, None)
    assert watch.record(lesson_of(round_), 1)["alarms"] == [TOLD.format("reset")]


def test_a_round_sampled_before_a_reset_does_not_trip_it_again() -> None:
    watch = watch_of(reset={"kl_to_reference": 5, "loss": 1})
    watch.begin(round_of(3, 6), GONE)
    watch.update(RESET_RECORD, 7)
    for index, version in ((4, 5), (5, 6)):  # in flight as it was reset
        watch.begin(round_of(index, version), GONE)
        assert done(watch) == NOTHING_DONE
        watch.update(an_update(loss=2.0), version + 3)
        assert done(watch) == NOTHING_DONE
        told = watch.record(lesson_of(round_of(index, version)), 4)["alarms"]
        assert told == [TOLD.format("reset"), "drift.reset.loss: 2 is above 1"]
    watch.begin(round_of(6, 7), GONE)  # by the policy that was put back, drifted again
    assert watch.resets is not None


def test_a_reset_that_the_last_update_of_a_round_asks_for_is_made() -> None:
    """With one update to a round there is no next one to take the place of."""
    watch = watch_of(reset={"grad_norm": 1})
    watch.begin(round_of(0, 0), SOUND)
    watch.update(an_update(grad_norm=2.0), 1)
    watch.begin(round_of(1, 1), SOUND)
    assert watch.resets is not None


def test_a_reset_that_an_update_asked_for_outlives_a_checkpoint() -> None:
    watch, resumed = (watch_of(reset={"grad_norm": 1}) for _ in range(2))
    watch.begin(round_of(0, 0), SOUND)
    watch.update(an_update(grad_norm=2.0), 1)
    resumed.load(json.loads(json.dumps(watch.state())))
    resumed.begin(round_of(0, 0), SOUND)
    assert done(resumed) == done(watch)


def test_the_pairs_whose_place_a_reset_takes_are_unused() -> None:
    watch, round_ = watch_of(reset={"kl_to_reference": 5}), round_of(0, 0)
    watch.begin(round_, GONE)
    watch.update(RESET_RECORD, 1)
    assert watch.record(lesson_of(round_), 1)["resampling"]["unused_pairs"] == 8


def test_what_stops_the_run_is_the_first_alarm_that_does() -> None:
    watch = watch_of(stop={"entropy": 3, "loss": 1}, warn={"kl_to_reference": 5})
    watch.begin(round_of(0, 0), GONE)
    assert done(watch) == (None, None, "drift.stop.entropy: 2 is below 3")
    watch.update(an_update(loss=2.0), 1)
    assert str(watch.stops) == "drift.stop.entropy: 2 is below 3"
    told = watch.record(lesson_of(round_of(0, 0)), 4)["alarms"]
    assert told == [
        "drift.stop.entropy: 2 is below 3",
        TOLD.format("warn"),
        "drift.stop.loss: 2 is above 1",
    ]


def test_a_nested_measure_is_watched() -> None:
    watch = watch_of(stop={"judging": {"tie_rate": 0.05}})
    watch.begin(round_of(0, 0), SOUND)
    assert str(watch.stops) == "drift.stop.judging.tie_rate: 0.1 is above 0.05"


def test_all_that_was_tripped_is_due_at_once() -> None:
    watch = watch_of(
        resample={"kl_to_reference": 5}, reset={"kl_to_reference": 6}, stop={"kl_to_reference": 7}
    )
    watch.begin(round_of(0, 0), GONE)
    assert done(watch) == (
        None,
        "drift.reset.kl_to_reference: 9 is above 6",
        "drift.stop.kl_to_reference: 9 is above 7",
    )
    watch.update(RESET_RECORD, 1)
    assert watch.ended == "drift.reset.kl_to_reference: 9 is above 6"


def test_an_update_without_pairs_trips_nothing_and_has_no_age() -> None:
    watch = watch_of({"ess_below": 0.5}, stop={"loss": {"above": 9, "below": 1}})
    watch.begin(round_of(0, 0), SOUND)
    watch.update(an_update(lag_max=0, policy_ess=1.0, policy_ess_per_token=0.9, loss=5.0), 1)
    ages = {"lag_max": 0, "policy_ess": 1.0, "policy_ess_per_token": 0.9}
    assert dict(watch.ages) == ages
    watch.update(RESET_RECORD, 2)
    assert done(watch) == NOTHING_DONE
    assert dict(watch.ages) == ages
    watch.begin(round_of(1, 2), SOUND)
    assert dict(watch.ages) == dict.fromkeys(ages)


def test_replayed_prompts_are_counted_and_their_pairs_are_not_its_own() -> None:
    shares = (Share(1, 0, 4, 4), Share(0, 4, 4, 4))
    watch, round_ = watch_of(resample={"loss": 1}), round_of(1, 4)
    own = Round(1, 4, round_.groups[:4], "judge", {})
    plan = RoundPlan(1, 4, 0, 4, shares)
    sampling = SamplingOptions(prompts_per_update=2)
    mixed = lesson(plan, own, sampling, Needs(), run_seed=0, earlier=round_.groups[4:])
    watch.begin(own, SOUND)
    watch.update(an_update(loss=2.0), 5)
    told = watch.record(mixed, 1)["resampling"]
    fed = sum(not item.replayed for item in mixed.batches()[0].completions) // 2
    assert told["replayed_prompts"] == 4
    assert told["unused_pairs"] == 4 - fed


THRESHOLDS = [
    *({action: {"kl_to_reference": 5}} for action in ("warn", "resample", "reset", "stop")),
    {"warn": {"loss": 1}, "resample": {"loss": 2}, "stop": {"loss": 3}},
]
RECORDS = [an_update(loss=loss) for loss in (0.5, 1.5, 0.7, 2.5)]


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, None])
@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
def test_taken_up_after_any_update_it_does_the_same(
    thresholds: dict[str, Any], cut: int | None
) -> None:
    """A resumed run begins the round again, with its panel, and goes on with the next update."""
    assert told_of_a_run(thresholds, cut) == told_of_a_run(thresholds, None)


def told_of_a_run(thresholds: dict[str, Any], cut: int | None) -> list[Any]:
    """A round of four updates, two in flight beside it, and what was told and due of each.

    The watch is another one, of a checkpoint, after ``cut`` updates.
    """
    watch = watch_of(**thresholds)
    found: list[Any] = []
    for index, version, updates in ((2, 4, RECORDS), (3, 4, RECORDS[:1]), (4, 8, RECORDS[:1])):
        round_ = round_of(index, version)
        watch.begin(round_, GONE)
        made = 0
        for at in range(len(updates) + 1):
            if index == 2 and at == cut:
                state = json.loads(json.dumps(watch.state()))
                watch = watch_of(**thresholds)
                watch.load(state)
                watch.begin(round_, GONE)
            if at < len(updates) and watch.ended is None:
                made += 1
                found.append(done(watch))
                watch.update(RESET_RECORD if watch.resets else updates[at], version + made)
        found.append((watch.record(lesson_of(round_), made), dict(watch.ages), watch.ended))
    return found
