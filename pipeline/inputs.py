"""What a run reads: model, prompts and plug-ins, each mistake found before anything is started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from judges.errors import UserError
from judges.plugins import is_plugin, load_plugin
from pipeline.completion_encoder import CompletionEncoder
from pipeline.config import Config
from pipeline.dashboards import wandb_module
from pipeline.given_pairs import GivenPairs
from pipeline.launch.crew import judges_of
from pipeline.pairing import Pairing
from pipeline.probes import Probes, read_bad, read_held_out
from pipeline.prompts import PromptEncoder, PromptOptions, PromptStream
from pipeline.staleness import Staleness
from pipeline.sync import PROBE_NEW_TOKENS, PROBE_PROMPT_TOKENS
from workers.endings import endings_of
from workers.generator import SamplingOptions
from workers.learner.objective_options import BcoOptions
from workers.messages import IntArray, Prompt
from workers.models.resolve import resolve_encoder, resolve_model


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads, checked before anything is started or written."""

    tokenizer: Any
    prompts: PromptStream | GivenPairs
    held_out: list[Prompt]
    context: int
    probes: Probes

    def first_prompts(self) -> list[Prompt]:
        """The first prompts that are learned from."""
        if isinstance(self.prompts, PromptStream):
            return self.prompts.take(0, 8)
        return [group.prompt for group in self.prompts.first(8)]

    def probe_ids(self) -> IntArray:
        """A fixed probe prompt: the first prompts of the stream end to end, cut to fit."""
        length = min(PROBE_PROMPT_TOKENS, self.context - PROBE_NEW_TOKENS)
        ids: list[int] = []
        while len(ids) < length:
            ids += [int(i) for prompt in self.first_prompts() for i in prompt.ids]
        return np.array(ids[:length], np.int64)


def check_inputs(cfg: Config) -> Inputs:
    """Model, prompts and plug-ins, each mistake found before anything is started or written."""
    tokenizer, window = load_tokenizer(cfg.policy.model)
    context = longest_sequence(cfg, window)
    location = resolve_model(cfg.policy.model)
    endings_of(location, tokenizer, cfg.sampling)
    ends = endings_of(location, tokenizer, SamplingOptions()).token_ids

    def encoder(options: PromptOptions) -> PromptEncoder:
        new_tokens = cfg.sampling.max_new_tokens
        template_args = options.chat_template_args
        return PromptEncoder(tokenizer, context, new_tokens, template_args, context < window)

    prompts: PromptStream | GivenPairs
    if cfg.prompts.pairs is None:
        prompts = PromptStream(cfg.prompts, encoder(cfg.prompts), cfg.run.seed)
        prompts.check()
    else:
        prompts = given_pairs(cfg, cfg.prompts.pairs, tokenizer, context, ends)
    held_out: list[Prompt] = []
    if cfg.evaluation.prompts is not None:
        stream = PromptStream(
            cfg.evaluation.prompts,
            encoder(cfg.evaluation.prompts),
            cfg.run.seed,
            purpose="evaluation",
            key="evaluation.prompts",
        )
        stream.check()
        held_out = stream.take(0, min(cfg.evaluation.count, len(stream)))
    for judge in judges_of(cfg).values():
        if is_plugin(judge.name):
            load_plugin(judge.name, key="judge.name")
    if cfg.tracking.wandb is not None:
        wandb_module()
    cfg.check_fit()
    if isinstance(cfg.objective, BcoOptions) and cfg.objective.embedding_model is not None:
        resolve_encoder(cfg.objective.embedding_model)
    pairing_of(cfg)
    Staleness(cfg.resampling.early)
    return Inputs(tokenizer, prompts, held_out, context, probes_of(cfg, tokenizer, context, ends))


def given_pairs(
    cfg: Config, path: str, tokenizer: Any, context: int, ends: Iterable[int]
) -> GivenPairs:
    """The pairs that a config names, each row checked.

    Raises UserError where rows are not what the objective learns from, or weights need a record of
    who wrote them and there is none.
    """
    options = cfg.prompts
    pairs = GivenPairs(
        path,
        tokenizer,
        options.chat_template_args,
        chat=options.chat,
        order=options.order,
        too_long=options.too_long,
        max_tokens=context,
        run_seed=cfg.run.seed,
        ends=ends,
        split=options.split,
        vocabulary=vocabulary_of(cfg.policy.model),
    )
    pairs.check()
    name = cfg.objective.name
    if pairs.unpaired and cfg.needs.records != "unpaired":
        raise UserError(
            f"prompts.pairs={path}: completions with a label, and {name} learns from pairs: use "
            "kto or bco"
        )
    if cfg.needs.sampling_logprobs and options.behaviour == "recorded" and not pairs.recorded:
        raise UserError(
            f"prompts.pairs={path}: weights need to know who wrote the pairs, and not every row "
            "has chosen_logprobs and rejected_logprobs: declare prompts.behaviour=reference, or "
            "leave the weights out"
        )
    return pairs


def vocabulary_of(model: str) -> int:
    """How many token ids the model has embeddings for."""
    from transformers import AutoConfig

    size: int = AutoConfig.from_pretrained(resolve_model(model)).get_text_config().vocab_size
    return size


def probes_of(cfg: Config, tokenizer: Any, context: int, ends: Iterable[int]) -> Probes:
    """The texts whose log-probabilities are watched, each checked."""
    encoder = CompletionEncoder(tokenizer, cfg.prompts.chat_template_args, ends)
    bad, held_out = cfg.drift.bad, cfg.drift.held_out
    return Probes(
        [] if bad is None else read_bad(bad, encoder, context, cfg.prompts.chat),
        [] if held_out is None else read_held_out(held_out, tokenizer, context),
    )


def longest_sequence(cfg: Config, context: int) -> int:
    """Prompt and completion together, in tokens: the model's context, or what is set below it."""
    longest = cfg.generator.max_model_len
    if longest is None:
        return context
    if longest > context:
        raise UserError(
            f"generator.max_model_len={longest}: {cfg.policy.model} has a context of {context} "
            "tokens; set it to that at most"
        )
    if longest <= cfg.sampling.max_new_tokens:
        raise UserError(
            f"generator.max_model_len={longest}: leaves no token for a prompt beside "
            f"sampling.max_new_tokens={cfg.sampling.max_new_tokens}; raise it, or lower that"
        )
    if longest <= PROBE_NEW_TOKENS:
        raise UserError(
            f"generator.max_model_len={longest}: every push is proved by {PROBE_NEW_TOKENS} tokens "
            f"after a prompt; set it to {PROBE_NEW_TOKENS + 1} at least"
        )
    return longest


def load_tokenizer(model: str) -> tuple[Any, int]:
    """The model's tokenizer and context length in tokens.

    Raises UserError for a model that cannot be had or a tokenizer without an end-of-sequence.
    """
    from transformers import AutoConfig, AutoTokenizer

    location = resolve_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        context = int(AutoConfig.from_pretrained(location).max_position_embeddings)
    except OSError as error:
        raise UserError(
            f"policy.model={model}: cannot be loaded ({str(error).strip().splitlines()[0]}): check "
            "the name and the network, or give a directory that save_pretrained wrote"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"policy.model={model}: its tokenizer has no end-of-sequence token, so no completion "
            "could end; set eos_token in its tokenizer_config.json"
        )
    return tokenizer, context


def pairing_of(cfg: Config) -> Pairing:
    """How completions become pairs or labels."""
    return Pairing(
        cfg.pairing,
        link=cfg.judge.link,
        link_temperature=cfg.judge.link_temperature,
        drop_truncated=cfg.sampling.truncated == "drop",
        run_seed=cfg.run.seed,
    )
