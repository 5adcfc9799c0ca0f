"""The config of a run: every key, its default and its meaning, checked before anything starts.

Each section stands beside what it configures; this file joins them and reads YAML. It loads none
of torch, ray, vllm.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from judges.errors import UserError
from judges.options import JudgeOptions, OtherJudge
from pipeline.config_files import absolute
from pipeline.drift_options import DriftOptions
from pipeline.fit import Served
from pipeline.generator_fit import Generation
from pipeline.judge_fit import check_judge
from pipeline.mistakes import explain
from pipeline.pairing import PairingOptions
from pipeline.placement import check_asks
from pipeline.prompts import PromptOptions
from pipeline.resampling_options import ResamplingOptions
from pipeline.storage import working_copy
from pipeline.tracking import TrackingOptions
from pipeline.training_prompts import TrainingPrompts
from workers.generator import GeneratorOptions, SamplingOptions
from workers.learner.needs import Needs
from workers.learner.objective_options import ObjectiveOptions, OwnOptions
from workers.learner.options import LearnerOptions, ReferenceOptions
from workers.learner.pairwise_options import DpoOptions
from workers.options import PolicyOptions
from workers.places import is_url, normalised


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunOptions(_Section):
    """What this run is called, how long it is, and the seed all its randomness derives from."""

    name: str = Field(default="run", min_length=1, description="Name of the run")
    dir: str | None = Field(
        default=None,
        description="Run directory: a path that every node sees, or object storage "
        "(s3://BUCKET/NAME, gs://BUCKET/NAME); null = runs/NAME",
    )
    seed: int = Field(default=0, description="Seed that every other seed is derived from")
    updates: int = Field(default=100, ge=1, description="Optimizer steps")

    @field_validator("dir")
    @classmethod
    def _as_written(cls, directory: str | None) -> str | None:
        try:
            return None if directory is None else normalised(directory)
        except UserError as mistake:
            raise UserError(f"run.dir={mistake}") from None


class EvaluationPrompts(PromptOptions):
    """Held-out prompts: often the training prompts' file, of which this takes another split."""

    split: str = Field(default="heldout", description="Split of the prompts to evaluate on")


class EvaluationOptions(_Section):
    """How often the policy is compared with the starting model on held-out prompts."""

    every: int | None = Field(
        default=None, ge=1, description="Updates between evaluations; null = only at the end"
    )
    prompts: EvaluationPrompts | None = Field(
        default=None, description="Held-out prompts; null = no evaluation"
    )
    count: int = Field(default=128, ge=2, description="Prompts to evaluate on, from the first")
    judges: list[OtherJudge] = Field(
        default_factory=list,
        description="Judges besides the training judge: names, or {name, args, client, …}",
    )


class CheckpointOptions(_Section):
    """What a killed run goes on from."""

    every: int = Field(default=8, ge=1, description="Updates between checkpoints")
    keep: int = Field(default=2, ge=1, description="Checkpoints kept, the newest")


class ClusterOptions(_Section):
    """Where the workers run."""

    address: str = Field(
        default="local",
        description="local = Ray on this machine; auto = the Ray cluster that this machine is part "
        "of; ray://HOST:10001 = one that it is not; inline = one process, no Ray",
    )
    placement: Literal["apart", "colocated"] = Field(
        default="apart",
        description="apart = workers share a GPU only by fractions of it, learner packed on few "
        "nodes, generators spread over many; colocated = the first generators share the "
        "learner's GPUs, one each",
    )
    wait_minutes: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="How long to wait for nodes that the cluster has not got yet; 0 = fail at once",
    )

    @field_validator("address")
    @classmethod
    def _known(cls, address: str) -> str:
        if address not in ("local", "auto", "inline") and not address.startswith("ray://"):
            raise ValueError("must be local, auto, inline or ray://HOST:PORT")
        return address


class Config(_Section):
    """A whole run."""

    run: RunOptions = Field(default_factory=RunOptions)
    policy: PolicyOptions = Field(default_factory=PolicyOptions)
    reference: ReferenceOptions = Field(default_factory=ReferenceOptions)
    prompts: TrainingPrompts
    sampling: SamplingOptions = Field(default_factory=SamplingOptions)
    resampling: ResamplingOptions = Field(default_factory=ResamplingOptions)
    generator: GeneratorOptions = Field(default_factory=GeneratorOptions)
    judge: JudgeOptions = Field(default_factory=JudgeOptions)
    pairing: PairingOptions = Field(default_factory=PairingOptions)
    objective: ObjectiveOptions = Field(default_factory=DpoOptions)
    learner: LearnerOptions = Field(default_factory=LearnerOptions)
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions)
    drift: DriftOptions = Field(default_factory=DriftOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    tracking: TrackingOptions = Field(default_factory=TrackingOptions)
    cluster: ClusterOptions = Field(default_factory=ClusterOptions)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        n = self.sampling.completions_per_prompt
        if n < 2:
            raise UserError(f"sampling.completions_per_prompt={n}: a pair needs at least 2")
        if self.resampling.passes > self.run.updates:
            raise UserError(
                f"resampling.passes={self.resampling.passes}: more than run.updates="
                f"{self.run.updates}; a round cannot be passed over that often"
            )
        if not isinstance(self.objective, OwnOptions):  # which is checked once it is loaded
            self.check_fit()
        return self

    def check_fit(self) -> None:
        """Raises UserError where other sections cannot give the objective what it needs."""
        served = Served(
            objective=self.objective,
            sampling=self.sampling,
            pairing=self.pairing,
            resampling=self.resampling,
            reference=self.reference,
            drift=self.drift,
            prompts=self.prompts,
            updates=self.run.updates,
        )
        served.check(self.needs)
        generation = Generation(
            generator=self.generator,
            policy=self.policy,
            resampling=self.resampling,
            learner=self.learner,
            objective=self.objective.name,
            inline=self.cluster.address == "inline",
        )
        generation.check(self.needs)
        check_judge(self)
        check_asks(self)

    @property
    def needs(self) -> Needs:
        """What objective and off-policy correction must be given."""
        return self.resampling.weights.widen(self.objective.needs)

    @property
    def run_place(self) -> str:
        """Where the run directory lasts: a path, as given or runs/NAME, or a URL."""
        return self.run.dir or str(Path("runs") / self.run.name)

    @property
    def run_dir(self) -> Path:
        """The run directory here: ``run_place``, or the working copy of object storage."""
        place = self.run_place
        return working_copy(place) if is_url(place) else Path(place)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply ``key.path=value`` overrides (values are YAML).

    Plug-in files and prompt files are found beside the config or in the working directory and
    become absolute. Raises UserError: one line for each mistake.
    """
    path = Path(path)
    return parse_config(read_config(path, overrides), base=path.parent, where=str(path))


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A config file's sections with the overrides in them, unchecked. Raises UserError."""
    raw = read_yaml(path)
    if raw.pop("environment", None) is not None:  # a run's own record: the new run goes elsewhere
        raw.get("run", {}).pop("dir", None)
    apply_overrides(raw, overrides)
    return raw


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a config file, unchecked. Raises UserError where it is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such config file{_nearest_file(path)}")
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of sections (run:, policy:, …)")
    return raw


def parse_config(raw: Mapping[str, Any], base: Path, where: str = "config") -> Config:
    """Validate a config given as a mapping; relative files are looked up in ``base`` first."""
    return absolute(check_config(raw, where), base)


def check_config(raw: Mapping[str, Any], where: str) -> Config:
    """The config with its files as they are written. Raises UserError: a line for each mistake."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = (f"{where}: {line}" for line in explain(Config, error.errors()))
        raise UserError("\n".join(lines)) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: ``2e-5`` is a number, not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set each ``key.path=value`` (YAML) in a mapping. Raises UserError for other forms."""
    for override in overrides:
        _override(raw, override)


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{override}: an override has the form key.path=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{override}: not valid YAML: {_one_line(error)}") from None
    *sections, last = key.split(".")
    place = raw
    for depth, section in enumerate(sections, start=1):
        inner = place.setdefault(section, {})
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{override}: {'.'.join(sections[:depth])} is a value, not a section")
        place = inner
    place[last] = value


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def threads_of(config: Config, cores: int) -> tuple[int, int]:
    """CPU threads of each generator and of the learner.

    ``auto``: a synchronous run (rounds_in_flight 0) lets them take turns with all cores; an
    overlapping one halves the cores between generation and learning.
    """
    overlap = config.resampling.rounds_in_flight > 0
    half = cores // 2
    for_generators = half if overlap else cores
    generator = config.generator.threads
    learner = config.learner.threads
    return (
        max(1, for_generators // config.generator.replicas) if generator == "auto" else generator,
        (max(1, cores - half) if overlap else cores) if learner == "auto" else learner,
    )
