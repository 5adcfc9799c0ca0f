"""Is the policy better than the model it started from? Held-out prompts, every judge, in pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from judges.interface import Text, text_of
from pipeline.comparison import Comparison, compare_probabilities, compare_scores
from pipeline.drift_measures import (
    central_band,
    distinct_ngrams,
    entropy,
    eos_rate,
    kl_per_token,
    kl_to_reference,
    length_mean,
    off_reference,
    repetition_rate,
)
from pipeline.judging import Judges
from pipeline.learner import RemoteLearner
from pipeline.replica import Replica
from pipeline.report import Sample
from pipeline.rollout import UnitSize, submit_units, work_units
from pipeline.storage import Storage
from pipeline.sync import WeightSync
from workers.generator import SampledUnit
from workers.judge_worker import prompt_text
from workers.messages import BatchCompletion, Completion, Judgement, Prompt, UpdateBatch
from workers.verdicts import asked_of


class Evaluator:
    """Compares the policy with the starting model on the same held-out prompts and seeds.

    Every evaluation is kept as ``evaluations/update-000008.parquet``; that of update 0 is the
    starting model's and the baseline of all others.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        replicas: Sequence[Replica],
        judges: Judges,
        names: Sequence[str],
        directory: Path,
        *,
        every: int | None,
        updates: int,
        unit_size: UnitSize,
        run_seed: int,
        reference_moves: bool = False,
        storage: Storage | None = None,
    ) -> None:
        """``storage`` keeps the evaluations; None: they last where they are."""
        self._storage = storage or Storage(directory.parent)
        self._prompts = tuple(prompts)
        self._replicas = replicas
        self._judges = judges
        self._names = names
        self._directory = directory
        self._every = every
        self._updates = updates
        self._unit_size = unit_size
        self._run_seed = run_seed
        self._reference_moves = reference_moves
        self._baseline: list[Completion] = []
        self.compared: list[tuple[Text, str, str]] = []
        """Of the last evaluation: prompt, the policy's completion, the starting model's."""

    def due(self, update: int) -> bool:
        """Whether to evaluate after this update: every so often, and at the end of the run."""
        if not self._prompts:
            return False
        return update == self._updates or (self._every is not None and update % self._every == 0)

    def baseline(self, learner: RemoteLearner, sync: WeightSync) -> None:
        """The starting model's completions: sampled at version 0, read back by a resumed run."""
        if not self._prompts:
            return
        path = self._path(0)
        if not path.exists():
            self._write(path, self._sample(learner, sync), {})
        self._baseline = read_completions(path)

    def evaluate(self, learner: RemoteLearner, sync: WeightSync) -> list[dict[str, Any]]:
        """One evaluation record for each judge; the generators hold the learner's version."""
        sampled = self._sample(learner, sync)
        batch = UpdateBatch(
            tuple(
                BatchCompletion(prompt.ids, completion)
                for prompt, completion in zip(self._prompts, sampled, strict=True)
            ),
            (),
        )
        (reference,) = learner.score_reference([batch])
        scored = [replace(c, reference_logprobs=r) for c, r in zip(sampled, reference, strict=True)]
        measures = self._drift(scored)
        chat = any(not isinstance(prompt.content, str) for prompt in self._prompts)
        self.compared = [
            (prompt_text(prompt, chat), new.text, old.text)
            for prompt, new, old in zip(self._prompts, scored, self._baseline, strict=True)
        ]
        judgements = {judge: self._judgements(judge, scored) for judge in self._names}
        self._write(self._path(learner.version), scored, judgements)
        return [
            {"judge": judge, **asdict(self._compare(found)), **invalid_reason(found), **measures}
            for judge, found in judgements.items()
        ]

    def _drift(self, scored: Sequence[Completion]) -> dict[str, float | None]:
        """How far the fresh held-out samples are from the reference and the starting model's.

        The band of ``off_reference_…`` is that of the starting model's samples: None where the
        reference is another model by now.
        """
        start = [replace(c, reference_logprobs=c.logprobs) for c in self._baseline]
        band = None if self._reference_moves else central_band(start)
        unlikely, likely = off_reference(scored, band) or (None, None)
        return {
            "kl_to_reference": kl_to_reference(scored),
            "kl_per_token": kl_per_token(scored),
            "entropy": entropy(scored),
            "off_reference_share": None
            if unlikely is None or likely is None
            else unlikely + likely,
            "off_reference_unlikely": unlikely,
            "off_reference_likely": likely,
            "distinct_ngrams": distinct_ngrams(scored),
            "distinct_ngrams_baseline": distinct_ngrams(self._baseline),
            "eos_rate": eos_rate(scored),
            "length_mean": length_mean(scored),
            "length_mean_baseline": length_mean(self._baseline),
            "repetition_rate": repetition_rate(scored),
            "repetition_rate_baseline": repetition_rate(self._baseline),
        }

    def _sample(self, learner: RemoteLearner, sync: WeightSync) -> list[Completion]:
        size = self._unit_size.of(len(self._prompts), 1)
        requests = work_units(self._prompts, size, (0.0,), self._run_seed, "evaluation")
        units = submit_units(self._replicas, requests)
        sampled = [group[0] for unit in units for group in unit.result().completions]
        sync.prove(learner.version)
        return sampled

    def _judgements(self, judge: str, sampled: Sequence[Completion]) -> list[Judgement]:
        both = tuple(zip(sampled, self._baseline, strict=True))
        unit = SampledUnit(both, 0.0)
        return list(self._judges.judge(judge, self._prompts, unit).result().judgements)

    def _compare(self, judgements: Sequence[Judgement]) -> Comparison:
        wins = [j.wins for j in judgements if j.wins is not None]
        if wins:  # the judge compares
            return compare_probabilities([float(w[0, 1]) for w in wins], self._run_seed)
        scores = np.array([j.scores for j in judgements])
        return compare_scores(scores[:, 0].tolist(), scores[:, 1].tolist(), self._run_seed)

    def samples(self, update: int, count: int) -> list[Sample]:
        """Some held-out prompts as the starting model and the policy of ``update`` went on."""
        if not self._prompts:
            return []
        return read_samples(self._path(0), self._path(update), count)

    def _path(self, update: int) -> Path:
        return self._directory / f"update-{update:06d}.parquet"

    def _write(
        self,
        path: Path,
        completions: Sequence[Completion],
        judgements: dict[str, list[Judgement]],
    ) -> None:
        columns: dict[str, list[Any]] = {
            "position": [c.position for c in completions],
            "seed": [c.seed for c in completions],
            "prompt": [text_of(p.content) for p in self._prompts],
            "completion": [c.text for c in completions],
            "ids": [c.ids.tolist() for c in completions],
            "logprobs": [c.logprobs.tolist() for c in completions],
            "finished": [c.finished for c in completions],
            "version": [c.version for c in completions],
        }
        for judge, found in judgements.items():
            columns[f"score.{judge}"] = [float(j.scores[0]) for j in found]
            columns[f"score_baseline.{judge}"] = [float(j.scores[1]) for j in found]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        pq.write_table(pa.table(columns), partial)
        self._storage.replace(partial, path)


def invalid_reason(judgements: Sequence[Judgement]) -> dict[str, str]:
    """``invalid_reason``: why a prompt had no verdict, of one, where there is such a prompt.

    A failure is told before what the judge declined.
    """
    missing = [
        (declined, judgement.reasons[completion] or "no reason given")
        for judgement in judgements
        for completion, value, declined in asked_of(judgement)
        if np.isnan(value)
    ]
    return {"invalid_reason": min(missing, key=lambda one: one[0])[1]} if missing else {}


def read_samples(before: Path, after: Path, count: int) -> list[Sample]:
    """The first prompts of two kept evaluations, as each completed them."""
    rows = zip(pq.read_table(before).to_pylist(), pq.read_table(after).to_pylist(), strict=True)
    return [
        Sample(prompt=old["prompt"], before=old["completion"], after=new["completion"])
        for old, new in itertools.islice(rows, count)
    ]


def read_completions(path: Path) -> list[Completion]:
    """The completions of a kept evaluation, one a held-out prompt."""
    rows = pq.read_table(path).to_pylist()
    return [
        Completion(
            position=row["position"],
            sample=0,
            seed=row["seed"],
            version=row["version"],
            ids=np.array(row["ids"], np.int64),
            logprobs=np.array(row["logprobs"], np.float32),
            sampling_logprobs=None,
            finished=row["finished"],
            text=row["completion"],
        )
        for row in rows
    ]
