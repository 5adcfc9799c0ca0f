"""UDM: which undesirable completions stand for the desirable ones' prompts (arXiv:2404.04656)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.messages import BatchExample, BatchLabel
from workers.models.encoder import SentenceEncoder

MEMORY = 8192
"""Labels, the latest, that the classifier is fitted to."""

LOWEST, HIGHEST = 0.5, 10.0


class DensityRatio:
    """Weights p/(1−p) of undesirable completions, p = P(desirable | prompt).

    p is the estimate of a logistic regression on sentence embeddings of the prompts, fitted to the
    labels seen so far, the current update's included. While only one kind was seen, weights are 1.
    """

    def __init__(self, model: str) -> None:
        self._encode = SentenceEncoder(model)
        self._embeddings: npt.NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._desirable: npt.NDArray[np.bool_] = np.empty(0, np.bool_)

    def __call__(self, examples: Sequence[BatchExample]) -> Tensor:
        """The weight [B] of each label, 1 where it is desirable. Takes the labels into memory."""
        from sklearn.linear_model import LogisticRegression

        labels = cast(Sequence[BatchLabel], examples)
        embeddings = self._encode([label.prompt for label in labels])
        desirable = np.array([label.desirable for label in labels])
        self._remember(embeddings, desirable)
        if self._desirable.all() or not self._desirable.any():
            return torch.ones(len(labels))
        classifier = LogisticRegression(class_weight="balanced", max_iter=1000)
        classifier.fit(self._embeddings, self._desirable)
        ratio = density_ratio(classifier.predict_proba(embeddings)[:, 1])
        return torch.from_numpy(np.where(desirable, 1.0, ratio)).float()

    def _remember(
        self, embeddings: npt.NDArray[np.float32], desirable: npt.NDArray[np.bool_]
    ) -> None:
        known = [self._embeddings] if len(self._embeddings) else []
        self._embeddings = np.concatenate([*known, embeddings])[-MEMORY:]
        self._desirable = np.concatenate([self._desirable, desirable])[-MEMORY:]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the labels in memory."""
        return {
            "embeddings": torch.from_numpy(self._embeddings),
            "desirable": torch.from_numpy(self._desirable),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._embeddings = state["embeddings"].numpy()
        self._desirable = state["desirable"].numpy()


def density_ratio(desirable_prob: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """``clamp(p/(1−p), 0.5, 10)``, [N]."""
    p = np.asarray(desirable_prob, np.float64)
    with np.errstate(divide="ignore"):
        return np.clip(p / (1.0 - p), LOWEST, HIGHEST)
