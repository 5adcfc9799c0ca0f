"""Reward functions written for TRL's GRPO and online trainers are judges as they stand.

TRL 1.16 calls them with prompts, completions, completion_ids, the data set's columns and
trainer_state, log_extra, log_metric by keyword (grpo_trainer.py, ``_calculate_rewards``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from judges.errors import UserError
from tests.judge_helpers import worker_of
from workers.judge_worker import JudgeWorker
from workers.messages import Completion, Judgement, Prompt

REWARDS = r'''
import asyncio
import functools
import math
import re


# docs/source/grpo_trainer.md, examples 1 to 6.

def long_in_tokens(completion_ids, **kwargs):
    """Longer completions, in tokens, are better."""
    return [float(len(ids)) for ids in completion_ids]


def long_in_characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def answer_format(completions, **kwargs):
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content) else 0.0 for content in contents]


def boxed(completions, ground_truth, **kwargs):
    matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    found = [match.group(1) if match else "" for match in matches]
    return [1.0 if one == truth else 0.0 for one, truth in zip(found, ground_truth)]


def of_one_task(prompts, completions, task, **kwargs):
    rewards = []
    for prompt, completion, which in zip(prompts, completions, task):
        if which == "math":
            rewards.append(1.0 if completion == "4" else -1.0)
        else:
            rewards.append(None)
    return rewards


async def over_the_network(prompts, completions, **kwargs):
    await asyncio.sleep(0.001)
    return [1.0 if completion else 0.0 for completion in completions]


def logging(completions, ground_truth, log_extra=None, log_metric=None, **kwargs):
    rewards = [1.0 if one == truth else 0.0 for one, truth in zip(completions, ground_truth)]
    if log_extra:
        log_extra("golden_answer", list(ground_truth))
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


# What may stand in a user's file beside these.

def from_keywords(completions, **kwargs):
    """All that TRL hands over is in kwargs; what is the trainer's own is asked for with care."""
    step = getattr(kwargs.get("trainer_state"), "global_step", 0)
    columns = zip(kwargs["completion_ids"], kwargs["weight"])
    return [weight * len(ids) + step for ids, weight in columns]


def curriculum(completions, trainer_state=None, **kwargs):
    progress = trainer_state.global_step / trainer_state.max_steps if trainer_state else 1.0
    return [progress * len(completion) for completion in completions]


def of_the_trainer(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step)] * len(completions)


def of_the_environment(environments, **kwargs):
    return [environment.counter for environment in environments]


def to_the_log(completions, log_metric, **kwargs):
    log_metric("mean_length", 1.0)
    return [1.0] * len(completions)


class _SoftOverlong:
    """Shaped like trl.rewards.get_soft_overlong_punishment: an instance that is called."""

    __name__ = "soft_overlong"

    def __init__(self, longest, cache):
        self.longest, self.cache = longest, cache

    def __call__(self, completion_ids: list[list[int]], **kwargs) -> list[float]:
        over = [len(ids) - (self.longest - self.cache) for ids in completion_ids]
        return [0.0 if n <= 0 else max(-1.0, -n / self.cache) for n in over]


soft_overlong = _SoftOverlong(longest=4, cache=2)


class _Scaled:
    """Shaped like trl.rewards.get_cosine_scaled_reward: columns, ids, None for some."""

    def __init__(self, longest):
        self.longest = longest

    def __call__(self, completions, solution, completion_ids, **kwargs):
        rewards = []
        for completion, right, ids in zip(completions, solution, completion_ids, strict=True):
            if right is None:
                rewards.append(None)
                continue
            cosine = math.cos(min(len(ids) / self.longest, 1.0) * math.pi)
            bounds = (0.5, 1.0) if completion[0]["content"] == right else (-0.5, -1.0)
            rewards.append(bounds[0] + 0.5 * (bounds[1] - bounds[0]) * (1.0 + cosine))
        return rewards


scaled = _Scaled(4)


class _Remote:
    async def __call__(self, prompts, completions, **kwargs):
        await asyncio.sleep(0)
        return [float(len(prompt) + len(one)) for prompt, one in zip(prompts, completions)]


remote = _Remote()


def _at_least(completions, threshold, **kwargs):
    return [float(len(completion) >= threshold) for completion in completions]


bound = functools.partial(_at_least, threshold=2)
'''


@pytest.fixture
def reward(tmp_path: Path):
    """A worker around one of the functions above."""
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)

    def build(name: str, **args: Any) -> JudgeWorker:
        return worker_of(name=f"{path}:{name}", args=args)

    return build


def completion(text: str, tokens: int) -> Completion:
    return Completion(
        position=0,
        sample=0,
        seed=0,
        version=0,
        ids=np.arange(7, 7 + tokens),
        logprobs=np.zeros(tokens, np.float32),
        sampling_logprobs=None,
        finished=True,
        text=text,
    )


def ask(
    worker: JudgeWorker, *texts: str, chat: bool = False, tokens: Sequence[int] = (), **columns: Any
) -> Judgement:
    """The judgement of a prompt's completions, by a judge that passed the check at the start."""
    content: Any = [{"role": "user", "content": "2+2?"}] if chat else "2+2?"
    prompt = Prompt(0, np.array([1, 2]), content, columns)
    lengths = tokens or [len(text) for text in texts]
    group = [completion(text, n) for text, n in zip(texts, lengths, strict=True)]
    worker.check([prompt])
    [judgement] = worker.judge([prompt], [group], chat=chat)
    return judgement


def scores(*args: Any, **columns: Any) -> list[float]:
    return ask(*args, **columns).scores.tolist()


def test_token_ids_by_name(reward):
    assert scores(reward("long_in_tokens"), "a", "b", tokens=(2, 4)) == [2.0, 4.0]


def test_text(reward):
    assert scores(reward("long_in_characters"), " blue.", " in the sky.") == [6.0, 12.0]


def test_chat(reward):
    right = "<think>1 + 2 is 3.</think><answer>3</answer>"
    assert scores(reward("answer_format"), right, "It is 3.", chat=True) == [1.0, 0.0]


def test_a_column_by_name(reward):
    texts = (r"It is \boxed{2}.", r"It is \boxed{6}.", "2")
    assert scores(reward("boxed"), *texts, ground_truth="2") == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="needs the column ground_truth, and the prompts have gold"):
        ask(reward("boxed"), "a", gold="2")


def test_none_is_no_score(reward):
    assert scores(reward("of_one_task"), "4", "5", task="math") == [1.0, -1.0]
    judged = ask(reward("of_one_task"), "4", "5", task="code")
    assert np.isnan(judged.scores).all()
    assert judged.reasons == ("returned None", "returned None")


def test_coroutines(reward):
    assert scores(reward("over_the_network"), "a", "") == [1.0, 0.0]
    assert scores(reward("remote"), "a", "bbb") == [5.0, 7.0]


def test_what_is_the_trainers_own_may_be_missing(reward):
    assert scores(reward("logging"), "4", "5", ground_truth="4") == [1.0, 0.0]
    assert scores(reward("curriculum"), "a", "bb") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("of_the_trainer", "trainer_state"),
        ("of_the_environment", "environments"),
        ("to_the_log", "log_metric"),
    ],
)
def test_a_function_that_cannot_do_without_it_is_told_so(reward, name, parameter):
    line = (
        rf"^judge\.name=.*rewards\.py:{name}: it needs {parameter}, which only TRL's trainers "
        rf"have: give that parameter a default, {parameter}=None$"
    )
    with pytest.raises(UserError, match=line):
        ask(reward(name), "a")


def test_a_column_may_have_such_a_name(reward):
    judged = ask(reward("of_the_environment"), "a", environments=7)
    assert judged.reasons == ("AttributeError: 'int' object has no attribute 'counter'",)


def test_everything_is_in_the_keywords(reward):
    assert scores(reward("from_keywords"), "a", "b", tokens=(2, 3), weight=0.5) == [1.0, 1.5]


def test_an_arg_goes_before_what_is_handed_over(reward):
    worker = reward("from_keywords", completion_ids=[[0] * 9])
    assert scores(worker, "a", tokens=(2,), weight=2) == [18.0]


def test_instances_that_are_called(reward):
    tokens = (2, 3, 4, 9)
    assert scores(reward("soft_overlong"), *"abcd", tokens=tokens) == [0.0, -0.5, -1.0, -1.0]
    worker = reward("scaled")
    judged = ask(worker, "4", "5", "4", "4", chat=True, tokens=(2, 2, 0, 9), solution="4")
    assert judged.scores.tolist() == pytest.approx([0.75, -0.75, 1.0, 0.5])
    assert ask(worker, "4", chat=True, solution=None).reasons == ("returned None",)


def test_partials(reward):
    assert scores(reward("bound"), "a", "bb") == [0.0, 1.0]
    assert scores(reward("_at_least", threshold=3), "aa", "bbb") == [0.0, 1.0]


def test_several_reward_functions_are_an_ensemble(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    members = [{"name": f"{path}:soft_overlong", "weight": 3}, f"{path}:boxed"]
    worker = worker_of(name="ensemble", args={"members": members})
    # z of 0 and −1 is ±1, as is that of 1 and 0: (3 − 1)/4 and (−3 + 1)/4.
    texts = ("2", r"\boxed{2}")
    assert scores(worker, *texts, tokens=(1, 9), ground_truth="2") == [0.5, -0.5]


@pytest.mark.filterwarnings("ignore")
def test_the_rewards_that_trl_ships():
    pytest.importorskip("trl", reason="TRL is an extra: pip install '.[bench]'")
    thought = "<think>\nIt is even.\n</think>\n4"
    worker = worker_of(name="trl.rewards:think_format_reward")
    assert scores(worker, thought, "<think>4", "4", chat=True) == [1.0, 0.0, 0.0]
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    globals().update(
        soft_overlong=get_soft_overlong_punishment(100, 20),
        repetition=get_repetition_penalty_reward(ngram_size=2),
    )
    worker = worker_of(name="tests.test_trl_rewards:soft_overlong")
    assert scores(worker, "a", "b", "c", tokens=(80, 90, 101)) == [0.0, -0.5, -1.0]
    worker = worker_of(name="tests.test_trl_rewards:repetition")
    assert scores(worker, "a", "b", tokens=(4, 1)) == [0.0, 0.0]
