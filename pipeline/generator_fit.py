"""Does the generator section fit the rest of a config? Each misfit is one line."""

from __future__ import annotations

import math
from dataclasses import dataclass

from judges.errors import UserError
from pipeline.resampling_options import ResamplingOptions
from workers.generator import GeneratorOptions
from workers.learner.needs import Needs
from workers.learner.options import LearnerOptions
from workers.options import PolicyOptions


@dataclass(frozen=True, slots=True)
class Generation:
    """The generator section and the sections that it depends on."""

    generator: GeneratorOptions
    policy: PolicyOptions
    resampling: ResamplingOptions
    learner: LearnerOptions
    objective: str
    inline: bool

    def check(self, needs: Needs) -> None:
        """Raises UserError where the backend cannot do what is asked for."""
        backend = self.generator.backend_for(needs)
        if backend == "vllm" and needs.opponent:
            raise UserError(
                f"generator.backend=vllm: {self.objective} draws from a mixture of policy and "
                "reference, and a vLLM engine holds one model: use transformers"
            )
        if backend == "transformers":
            self._check_transformers()
        self._check_engine()
        self._check_in_flight_updates()
        self._check_min_replicas()
        self._check_transport()
        gap = self.generator.gap
        if gap.weight_clip is not None and gap.correct_above is None:
            raise UserError(
                "generator.gap.correction=truncated: no round is corrected without "
                "generator.gap.correct_above: set it, in nats a token, or leave correction out"
            )
        if gap.weight_clip is not None and needs.sampling_logprobs:
            raise UserError(
                "generator.gap.correction=truncated: importance weights count the gap already: set "
                "it to recompute, or leave out objective.weights and resampling.correction"
            )
        if gap.correct_above is not None and self.resampling.rounds_in_flight:
            raise UserError(
                "generator.gap.correct_above: the learner recomputes a round by the version that "
                f"sampled it, which resampling.rounds_in_flight={self.resampling.rounds_in_flight} "
                "leaves behind: set it to 0, or leave correct_above out"
            )

    def _check_transformers(self) -> None:
        generator = self.generator
        wanted = {
            "engine": ", ".join(generator.engine),
            "gpus": f"{generator.gpus:g}" if generator.gpus else "",
            "dtype": generator.dtype if generator.dtype_for(self.policy) != "float32" else "",
            "in_flight_updates": "true" if generator.in_flight_updates else "",
        }
        for key, value in wanted.items():
            if value:
                raise UserError(
                    f"generator.{key}={value}: the embedded transformers backend samples in "
                    "float32 on the CPU, between pushes, and takes no engine arguments: leave it "
                    "out, or use generator.backend=vllm (make install-vllm)"
                )

    def _check_engine(self) -> None:
        engine, gpus = self.generator.engine, self.generator.gpus
        sizes = [engine.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
        wanted = math.prod(size for size in sizes if isinstance(size, int))
        if gpus and wanted > 1 and gpus != wanted:
            raise UserError(
                f"generator.gpus={gpus:g}: an engine of {wanted} GPUs (tensor_parallel_size × "
                f"pipeline_parallel_size) needs {wanted} of them; set it to that"
            )
        if self.generator.in_flight_updates and engine.get("async_scheduling"):
            raise UserError(
                "generator.engine.async_scheduling=true: with in_flight_updates a step must be "
                "over when weights come in: leave it out"
            )

    def _check_in_flight_updates(self) -> None:
        if not self.generator.in_flight_updates:
            return
        if self.resampling.rounds_in_flight == 0 or self.inline:
            where = "cluster.address=inline" if self.inline else "resampling.rounds_in_flight=0"
            raise UserError(
                f"generator.in_flight_updates=true: with {where} no round is being sampled when "
                "weights are pushed: set resampling.rounds_in_flight to 1 or more on Ray, or leave "
                "it out"
            )

    def _check_min_replicas(self) -> None:
        fewest, replicas = self.generator.min_replicas, self.generator.replicas
        if fewest is None:
            return
        if fewest > replicas:
            raise UserError(
                f"generator.min_replicas={fewest}: more than generator.replicas={replicas}, the "
                "most there will be: lower it, or raise generator.replicas"
            )
        if self.generator.in_flight_updates:
            raise UserError(
                f"generator.min_replicas={fewest}: what a lost generator owed is sampled anew by "
                "another, which in_flight_updates gives newer weights meanwhile: leave one out"
            )

    def _check_transport(self) -> None:
        transport = self.generator.moves_by
        if transport not in ("nccl", "ipc"):
            return
        if self.inline:
            raise UserError(
                f"generator.transport={transport}: moves weights between processes, and "
                "cluster.address=inline has one: use object_store"
            )
        if not (self.generator.gpus and self.learner.gpus):
            raise UserError(
                f"generator.transport={transport}: moves weights from GPU to GPU, but "
                f"generator.gpus={self.generator.gpus:g} and learner.gpus={self.learner.gpus:g}: "
                "give both a GPU, or use object_store or gloo"
            )
