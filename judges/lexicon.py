"""Judges from word lists: quick, deterministic, offline; for demos and tests, not for taste."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from judges.interface import Text, text_of


def sentiment(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
    """VADER's compound sentiment of each completion, in [-1, 1]; 0 for text without such words.

    Hutto and Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis", ICWSM 2014.
    """
    analyzer = _vader()
    return [analyzer.polarity_scores(text_of(c))["compound"] for c in completions]


def polarity(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
    """TextBlob's polarity of each completion, in [-1, 1]: a lexicon independent of VADER's."""
    from textblob import TextBlob

    return [TextBlob(text_of(c)).sentiment.polarity for c in completions]


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
