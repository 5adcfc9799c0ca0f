"""Thresholds: read from a config, refused where they cannot trip, and tripped."""

import math
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError

from judges.errors import UserError
from pipeline.brake import Alarm, Brake
from pipeline.drift_options import (
    MEASURES,
    DriftOptions,
    HeldOutOptions,
    check_measurable,
)
from pipeline.mistakes import explain


class Sections(BaseModel):
    """A config of one section, for errors to name their place in."""

    drift: DriftOptions = Field(default_factory=DriftOptions)


def brake(**thresholds: Any) -> Brake:
    return Brake(DriftOptions(**thresholds))


def mistake(**drift: Any) -> str:
    """The one line that a user reads."""
    with pytest.raises(ValidationError) as raised:
        Sections.model_validate({"drift": drift})
    (line,) = explain(Sections, raised.value.errors())
    return line


def told(alarms: list[Alarm]) -> list[str]:
    return [str(alarm) for alarm in alarms]


def test_by_default_nothing_trips() -> None:
    options = DriftOptions()
    assert (options.warn, options.resample, options.reset, options.stop) == ({}, {}, {}, {})
    assert brake().tripped(dict.fromkeys(MEASURES, 1e9)) == []


def test_a_number_is_a_bound_in_the_direction_of_drift() -> None:
    stop = {"kl_to_reference": 30, "entropy": 0.5}
    assert told(brake(stop=stop).tripped({"kl_to_reference": 31.2, "entropy": 0.7})) == [
        "drift.stop.kl_to_reference: 31.2 is above 30"
    ]
    assert told(brake(stop=stop).tripped({"kl_to_reference": 3.0, "entropy": 0.25})) == [
        "drift.stop.entropy: 0.25 is below 0.5"
    ]


@pytest.mark.parametrize(
    "measure",
    [
        *("kl_to_reference", "kl_per_token", "length_ratio", "repetition_rate"),
        *("off_reference_share", "off_reference_unlikely", "off_reference_likely"),
        *("self_similarity", "bad_mass", "bad_logps", "held_out_nll", "logprob_gap"),
        *("kl_from_sampler", "grad_norm", "loss", "margin"),
    ],
)
def test_more_of_these_is_drift(measure: str) -> None:
    (alarm,) = brake(warn={measure: 1}).tripped({measure: 2})
    assert alarm == Alarm("warn", measure, 2.0, 1.0, "above")
    assert brake(warn={measure: 1}).tripped({measure: 0}) == []


@pytest.mark.parametrize(
    "measure",
    [
        *("entropy", "eos_rate", "distinct_ngrams", "score_mean", "score_std"),
        *("chosen_logps_change", "rejected_logps_change", "ess", "ess_per_token", "accuracy"),
        *("chosen_logps", "rejected_logps"),
    ],
)
def test_less_of_these_is_drift(measure: str) -> None:
    (alarm,) = brake(warn={measure: 1}).tripped({measure: 0})
    assert alarm == Alarm("warn", measure, 0.0, 1.0, "below")
    assert brake(warn={measure: 1}).tripped({measure: 2}) == []


def test_both_sides_may_be_bound() -> None:
    bound = brake(warn={"length_ratio": {"above": 1.5, "below": 0.5}})
    assert bound.tripped({"length_ratio": 1.0}) == []
    assert told(bound.tripped({"length_ratio": 2.0})) == ["drift.warn.length_ratio: 2 is above 1.5"]
    assert told(bound.tripped({"length_ratio": 0.25})) == [
        "drift.warn.length_ratio: 0.25 is below 0.5"
    ]


@pytest.mark.parametrize("value", [None, math.nan, 30, 29.9])
def test_what_is_undefined_or_on_the_bound_passes_nothing(value: float | None) -> None:
    assert brake(stop={"kl_to_reference": 30}).tripped({"kl_to_reference": value}) == []
    both = brake(stop={"kl_to_reference": {"above": 30, "below": 29}})
    assert both.tripped({"kl_to_reference": value}) == []


def test_infinity_passes_a_bound_and_a_record_without_the_measure_passes_none() -> None:
    assert brake(stop={"grad_norm": 1e6}).tripped({"grad_norm": math.inf})
    assert brake(stop={"grad_norm": 1e6}).tripped({"kl_to_reference": 1e9}) == []


def test_a_dot_leads_into_a_nested_record() -> None:
    stop = brake(stop={"judging.tie_rate": 0.5, "judging.flip_rate": 0.1, "dropped.truncated": 3})
    measures = {"judging": {"tie_rate": 0.75, "flip_rate": None}, "dropped": {"truncated": 4}}
    assert told(stop.tripped(measures)) == [
        "drift.stop.judging.tie_rate: 0.75 is above 0.5",
        "drift.stop.dropped.truncated: 4 is above 3",
    ]
    assert stop.tripped({"judging": {}}) == []


def test_an_override_of_a_nested_measure_is_a_mapping_in_a_mapping() -> None:
    nested = DriftOptions(stop={"judging": {"tie_rate": 0.5}})
    assert nested == DriftOptions(stop={"judging.tie_rate": 0.5})


def test_options_survive_the_resolved_config() -> None:
    options = DriftOptions(
        warn={"length_ratio": {"above": 2}}, stop={"entropy": 0.5}, bad="b.jsonl"
    )
    assert DriftOptions.model_validate(options.model_dump()) == options


def test_the_severest_alarm_comes_first() -> None:
    of_all = brake(
        warn={"kl_to_reference": 1},
        resample={"kl_to_reference": 2},
        reset={"kl_to_reference": 3},
        stop={"kl_to_reference": 4},
    )
    alarms = of_all.tripped({"kl_to_reference": 3.5})
    assert [alarm.action for alarm in alarms] == ["reset", "resample", "warn"]
    assert of_all.tripped({"kl_to_reference": 5})[0].action == "stop"


def test_an_alarm_shows_a_value_next_to_its_bound() -> None:
    alarm = Alarm("stop", "entropy", 0.49999999, 0.5, "below")
    assert str(alarm) == "drift.stop.entropy: 0.49999999 is below 0.5"


@pytest.mark.parametrize(
    ("drift", "line"),
    [
        (
            {"stop": {"kl_to_referense": 3}},
            "drift.stop.kl_to_referense: unknown measure; the nearest is 'kl_to_reference'",
        ),
        (
            {"warn": {"tie_rates": 3}},
            "drift.warn.tie_rates: unknown measure; the nearest is 'judging.tie_rate'",
        ),
        (
            {"warn": {"judging": {"tierate": 3}}},
            "drift.warn.judging.tierate: unknown measure; the nearest is 'judging.tie_rate'",
        ),
        (
            {"stop": {"entropy": "high"}},
            "drift.stop.entropy=high: must be a number, or a mapping of above and below to one",
        ),
        (
            {"stop": {"entropy": True}},
            "drift.stop.entropy=True: must be a number, or a mapping of above and below to one",
        ),
        (
            {"stop": {"entropy": {"abov": 1}}},
            "drift.stop.entropy: unknown key; did you mean 'above'?",
        ),
        (
            {"stop": {"entropy": {}}},
            "drift.stop.entropy: no threshold: give above, below or both",
        ),
        (
            {"stop": {"entropy": {"above": 1, "below": 2}}},
            "drift.stop.entropy: every number is above 1 or below 2",
        ),
        (
            {"stop": {"gap_weight": 1.1}},
            "drift.stop.gap_weight=1.1: both ways are drift: write {above: …}, {below: …} or both",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(drift: dict[str, Any], line: str) -> None:
    assert mistake(**drift) == line


def test_a_bound_is_finite() -> None:
    assert mistake(stop={"entropy": math.inf}).startswith("drift.stop.entropy=inf: must be")


def refused(options: DriftOptions, **known: Any) -> list[str]:
    with pytest.raises(UserError) as raised:
        check_measurable(options, **known)
    return str(raised.value).splitlines()


def test_a_measure_that_never_is_there_is_refused() -> None:
    options = DriftOptions(
        warn={"bad_mass": 0.1, "length_ratio": 2, "entropy": 1},
        stop={"kl_to_reference": 30, "held_out_nll": {"above": 4, "below": 1}},
    )
    assert refused(options, reference=False) == [
        "drift.warn.bad_mass={above: 0.1}: needs completions to watch: give their file in "
        "drift.bad, or leave the threshold out",
        "drift.warn.length_ratio={above: 2}: needs a reference, and none is kept: set "
        "drift.reference to true, or leave the threshold out",
        "drift.stop.kl_to_reference={above: 30}: needs a reference, and none is kept: set "
        "drift.reference to true, or leave the threshold out",
        "drift.stop.held_out_nll={above: 4, below: 1}: needs text to watch: give its file in "
        "drift.held_out, or leave the threshold out",
    ]


def test_a_measure_that_is_there_is_not_refused() -> None:
    check_measurable(
        DriftOptions(
            bad="bad.jsonl",
            held_out=HeldOutOptions(path="text.jsonl"),
            warn={"bad_mass": 0.1, "bad_logps": -3, "held_out_nll": 4, "length_ratio": 2},
            reset={"off_reference_share": 0.5},
        ),
        reference=True,
    )


def test_an_averaged_reference_writes_no_samples_and_given_pairs_are_none() -> None:
    shares = DriftOptions(warn={"off_reference_unlikely": 0.1, "kl_per_token": 1})
    (line,) = refused(shares, reference=True, averaged=True)
    assert line.startswith("drift.warn.off_reference_unlikely={above: 0.1}: needs samples by the")
    (line,) = refused(DriftOptions(stop={"entropy": 1, "ess": 0.1}), reference=True, samples=False)
    assert line == (
        "drift.stop.entropy={below: 1}: needs fresh samples, and the pairs are given: leave it out"
    )


def test_a_reset_needs_a_reference() -> None:
    (line,) = refused(DriftOptions(reset={"entropy": 1}), reference=False)
    assert line.startswith("drift.reset: no reference is kept to go back to")


def test_null_takes_a_threshold_away() -> None:
    """As an override of a resumed run does."""
    options = DriftOptions(stop={"entropy": None, "kl_per_token": 1})
    assert [measure for _, measure, _ in options.thresholds()] == ["kl_per_token"]
