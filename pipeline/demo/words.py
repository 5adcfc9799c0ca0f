"""What is seen, in words: each sentence follows from the numbers of its snapshot."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.demo.worlds import (
    BAD,
    BETA,
    GOOD,
    PAIRS_PER_UPDATE,
    UPDATES,
    Setting,
    Snapshot,
    Worlds,
)

OFFLINE, ONLINE = 0, 3
"""The settings that the sentences set against each other."""


def percent(share: float) -> str:
    """A probability as a person reads it: one digit below 1 %, at most one decimal above."""
    if share < 1e-6:
        return "< 0.0001 %"
    shown = f"{100 * share:.1f}" if share >= 0.01 else f"{100 * share:.6f}"
    if share < 0.01:
        decimals = next(place for place, digit in enumerate(shown[2:], start=1) if digit != "0")
        shown = f"{100 * share:.{decimals}f}"
    return f"{shown.removesuffix('.0')} %"


def number(value: float) -> str:
    """Two decimals, and a minus as wide as a plus."""
    return f"{value:.2f}".replace("-", "−")


def introduction(worlds: Worlds) -> tuple[str, str]:
    """The worlds, and what is done in them."""
    return (
        f"{len(worlds.seeds)} worlds of {GOOD + BAD} completions each. {BAD} of them are bad, and "
        "the reference all but never says them; but they have much of a feature, say length, "
        f"that goes with quality among the other {GOOD}.",
        f"DPO (β {BETA}) learns from {UPDATES} updates of {PAIRS_PER_UPDATE} judged pairs, at "
        "settings of the dial from offline (all pairs are the reference's) to fresh pairs for "
        "every update.",
    )


def sentence(now: Snapshot, settings: Sequence[Setting]) -> str:
    """What this snapshot shows of offline and resampled learning."""
    worlds = now.bad_mass.shape[1]
    online = settings[ONLINE].label
    if now.update == 0:
        mass = percent(float(now.bad_mass[OFFLINE].mean()))
        return f"All start as the reference, which says one of the bad four in {mass} of cases."
    if now.leaked[OFFLINE] == 0:
        offline, resampled = (number(now.reward_SW[index].mean()) for index in (OFFLINE, ONLINE))
        return f"No leak so far: true reward is {offline} offline, {resampled} resampled {online}."
    return (
        f"More than 1 % on the bad four: offline in {now.leaked[OFFLINE]} of {worlds} worlds, "
        f"resampled {online} in {now.leaked[ONLINE]}."
    )


def conclusion(first: Snapshot, last: Snapshot, settings: Sequence[Setting], best: float) -> str:
    """One sentence on the whole study; ``best`` is the true reward of the optimum."""
    worlds = last.bad_mass.shape[1]
    start = number(first.reward_SW[OFFLINE].mean())
    offline, online = (number(last.reward_SW[index].mean()) for index in (OFFLINE, ONLINE))
    shown = "hardly a pair" if last.judged_bad_SW[OFFLINE].any() else "no judged pair"
    judged, with_bad = (counts[ONLINE].mean() for counts in (last.judged_SW, last.judged_bad_SW))
    return (
        f"Offline, {last.leaked[OFFLINE]} of {worlds} policies leaked to what {shown} had shown "
        f"(true reward from {start} to {offline}); resampled {settings[ONLINE].label}, "
        f"{last.leaked[ONLINE]} of {worlds} did ({online}; the optimum has {number(best)}), "
        f"because what a policy begins to say is judged: {with_bad:.0f} of {judged:,.0f} judged "
        "pairs a world held one of the bad four."
    )
