"""Judges from word lists and small models: quick, deterministic, offline; not for taste."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any

from judges.errors import UserError
from judges.interface import Score, Text, text_of

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)*\]]*\s+|\n\s*\n")
_SILENT_ENDING = re.compile(
    r"(?<![aeiouy])(?<![^aeiouy]l)e$|(?<![tdaeiou])ed$|(?<![csxzhg])(?<![^aeiouy]l)es$|^y"
)
_VOWELS = re.compile(r"eau|[aeiouy]{1,2}")


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


class Language:
    """1 where a completion is in one of the languages, 0 where it is in another.

    py3langid's classifier (Lui and Baldwin, "langid.py: an off-the-shelf language identification
    tool", ACL 2012) decides by a probability above 0.5; the score's reason says which. It declines
    where no language is that likely: a text that is too short, or hardly text.
    """

    def __init__(self, language: str | Sequence[str]) -> None:
        """``language``: a code like de (ISO 639-1, or -3 where that has none), or several.

        Raises UserError for a language that the classifier does not know.
        """
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self._asked = _codes(language)
        known = sorted(set(self._identifier.labels) - {"zxx"})
        for code in self._asked:
            if code not in known:
                raise UserError(
                    f"judge.args.language={code}: no such language: write one of {', '.join(known)}"
                )

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text]
    ) -> list[float | Score | None]:
        """0, 1 or declined, with the likeliest language and its probability as the reason."""
        return [self._judged(text_of(completion)) for completion in completions]

    def _judged(self, text: str) -> Score:
        ranked = self._identifier.rank(text)
        likeliest, probability = ranked[0]
        reason = f"{likeliest} {probability:.2f}"
        if sum(p for code, p in ranked if code in self._asked) > 0.5:
            return Score(1.0, reason)
        if likeliest not in self._asked and probability > 0.5:
            return Score(0.0, reason)
        return Score(None, f"no language is likely: {reason}", declined=True)


class Readability:
    """How easy an English completion is to read, from the lengths of its sentences and words.

    It declines where there are no words of letters. Syllables are counted as groups of one or two
    vowels but for silent endings: as CMUdict counts them for 97 of 100 words of plain prose.
    """

    def __init__(self, measure: str = "flesch_reading_ease") -> None:
        """Raises UserError for a measure that is none of these.

        ``flesch_reading_ease`` is at most 121.22, and higher is easier (Flesch, "A new readability
        yardstick", Journal of Applied Psychology 32, 1948). ``flesch_kincaid_grade`` is a US school
        grade of at least −3.4, and higher is harder (Kincaid et al., Research Branch Report 8-75,
        1975).
        """
        match measure:
            case "flesch_reading_ease":
                self._weights = (206.835, -1.015, -84.6)
            case "flesch_kincaid_grade":
                self._weights = (-15.59, 0.39, 11.8)
            case _:
                raise UserError(
                    f"judge.args.measure={measure}: no such measure: "
                    "write flesch_reading_ease or flesch_kincaid_grade"
                )

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text]
    ) -> list[float | Score | None]:
        """The measure of each completion."""
        return [self._judged(text_of(completion)) for completion in completions]

    def _judged(self, text: str) -> float | Score:
        words = _WORD.findall(text)
        if not words:
            return Score(None, "there are no words in it", declined=True)
        sentences = sum(_WORD.search(part) is not None for part in _SENTENCE_END.split(text))
        syllables = sum(_syllables(word) for word in words)
        constant, of_sentences, of_words = self._weights
        words_a_sentence, syllables_a_word = len(words) / sentences, syllables / len(words)
        return constant + of_sentences * words_a_sentence + of_words * syllables_a_word


class Profanity:
    """1 − P(profane or offensive) of each completion, in [0, 1]: 1 is the cleanest. English.

    A linear model over words, from the package alt-profanity-check.
    """

    def __init__(self) -> None:
        """Raises UserError where the package is missing, or made for another scikit-learn."""
        from sklearn.exceptions import InconsistentVersionWarning

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", InconsistentVersionWarning)
                from profanity_check import predict_prob
        except (ImportError, AttributeError, ValueError, InconsistentVersionWarning) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"judge.name=profanity: alt-profanity-check cannot be loaded ({reason}): "
                "pip install --upgrade alt-profanity-check"
            ) from error
        self._probability = predict_prob

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """Scores in [0, 1]."""
        if not completions:
            return []
        profane = self._probability([text_of(completion) for completion in completions])
        return [1.0 - probability for probability in profane.tolist()]


def _codes(language: object) -> list[object]:
    codes = language if isinstance(language, list | tuple) else [language]
    if False in codes:
        raise UserError('judge.args.language=no: YAML reads it as false: write "no" in quotes')
    if not codes:
        raise UserError("judge.args.language=[]: no language: write a code like de")
    return list(codes)


def _syllables(word: str) -> int:
    spoken = _SILENT_ENDING.sub("", word.lower())
    return max(1, len(_VOWELS.findall(spoken)))


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
