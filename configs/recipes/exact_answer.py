"""A judge of answers that are right or wrong: 1 where a completion's final answer is the row's."""

import re

GSM8K = r"####\s*(-?[\d.,]+)"


def score(prompts, completions, answer, pattern=GSM8K, **columns):
    """``pattern`` finds the answer in a completion (its first group, the last match); the row's
    ``answer`` is what follows ####. Commas and a final full stop do not count; a completion without
    an answer is wrong."""
    return [
        float(_final(re.findall(pattern, completion)) == _plain(expected.rpartition("####")[2]))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def _final(found):
    return _plain(found[-1]) if found else None


def _plain(answer):
    return answer.strip().replace(",", "").rstrip(".").casefold()
