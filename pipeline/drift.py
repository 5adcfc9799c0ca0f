"""Drift: how far the policy has left its reference and its data.

Most measures come from log-probabilities the round already carries, so watching costs nothing; only
the probes are scored anew, in one call as a round begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.drift_measures import (
    Band,
    central_band,
    distinct_ngrams,
    entropy,
    eos_rate,
    kl_per_token,
    kl_to_reference,
    length_mean,
    length_ratio,
    off_reference,
    own_completions,
    own_scores,
    repetition_rate,
    self_similarity,
)
from pipeline.probes import Probes, ScorePolicy
from workers.messages import Completion, Fate, PromptGroup, Round

DROPPED = tuple(fate for fate in Fate if fate is not Fate.LEARN)


class Drift:
    """Measures each round once, as it begins to be learned from, and remembers what it must.

    It remembers where the reference's own samples lie, the probes' first log-probabilities, and the
    panel of the round that is being learned from: a run resumed in its middle has the same panel,
    although its policy has moved on.

    Where the reference's samples lie is the band (the central 98 % of their mean reference
    log-probability) and their mean length, over the completions of a round whose policy is the
    reference: the first one of each reference.
    """

    def __init__(self, averaged: bool = False, probes: Probes | None = None) -> None:
        """``averaged``: past version 0 the reference is a mean of policies, none of which it is."""
        self._averaged = averaged
        self._probes = probes or Probes()
        self._band: Band | None = None
        self._reference_length: float | None = None
        self._reference_version: int | None = None
        self._round: int | None = None
        self._panel: dict[str, Any] = {}

    def of(self, round_: Round, score_policy: ScorePolicy | None = None) -> dict[str, Any]:
        """The round's panel: float, int, None where undefined; ``dropped``, ``judging`` nest.

        To be asked for when the reference has scored the round and no update has learned from it;
        asked for the same round again, the panel is what it was. ``score_policy`` is called at most
        once, where there are probes; without it their measures are None.

        Measures of completions are of the policy's own fresh samples: an opponent's are left out,
        and in a round of given pairs they are all None. ``pairs`` and ``dropped`` count labels
        where completions are labelled without a partner. ``off_reference_unlikely`` and
        ``_likely`` are the shares of completions below and above the band, ``off_reference_share``
        their sum: None where the round has no reference log-probabilities or its reference never
        sampled a round.
        """
        if round_.index != self._round:
            panel = self._counts(round_) | self._of_samples(round_)
            panel |= self._probes.measures(round_, score_policy)
            self._round, self._panel = round_.index, panel
        return dict(self._panel)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "band": None if self._band is None else list(self._band),
            "reference_length": self._reference_length,
            "reference_version": self._reference_version,
            "round": self._round,
            "panel": self._panel,
            "probes": self._probes.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        band = state["band"]
        self._band = None if band is None else (float(band[0]), float(band[1]))
        self._reference_version = state["reference_version"]
        # What follows is missing from checkpoints that were written before it was measured.
        self._reference_length = state.get("reference_length")
        self._round = state.get("round")
        self._panel = dict(state.get("panel", {}))
        self._probes.load(state.get("probes", []))

    @staticmethod
    def _counts(round_: Round) -> dict[str, Any]:
        fates = Counter([pair.fate for pair in round_.pairs] + [x.fate for x in round_.labels])
        return {
            "reference_version": round_.reference_version,
            "prompts": len(round_.groups),
            "completions": len(round_.completions),
            "pairs": fates[Fate.LEARN],
            "dropped": {fate.value: fates[fate] for fate in DROPPED},
            "judging": dict(round_.judging),
        }

    def _of_samples(self, round_: Round) -> dict[str, float | None]:
        """The measures of fresh samples; a given round has none, so all of them are None."""
        groups: Sequence[PromptGroup] = () if round_.given else round_.groups
        completions = own_completions(groups)
        if not round_.given:
            self._remember_reference(round_, completions)
        of_this_reference = round_.reference_version == self._reference_version
        band = self._band if of_this_reference else None
        reference_length = self._reference_length if of_this_reference else None
        scores = own_scores(groups)
        unlikely, likely = off_reference(completions, band) or (None, None)
        return {
            "score_mean": float(scores.mean()) if scores.size else None,
            "score_std": float(scores.std()) if scores.size else None,
            "kl_to_reference": kl_to_reference(completions),
            "kl_per_token": kl_per_token(completions),
            "entropy": entropy(completions),
            "length_mean": length_mean(completions),
            "length_ratio": length_ratio(completions, reference_length),
            "eos_rate": eos_rate(completions),
            "off_reference_unlikely": unlikely,
            "off_reference_likely": likely,
            "off_reference_share": None
            if unlikely is None or likely is None
            else unlikely + likely,
            "repetition_rate": repetition_rate(completions),
            "distinct_ngrams": distinct_ngrams(completions),
            "self_similarity": self_similarity(groups),
        }

    def _remember_reference(self, round_: Round, completions: Sequence[Completion]) -> None:
        is_reference = round_.version == round_.reference_version
        if self._averaged and round_.version > 0:
            is_reference = False
        if is_reference and round_.reference_version != self._reference_version:
            self._band = central_band(completions)
            self._reference_length = length_mean(completions)
            self._reference_version = round_.reference_version
