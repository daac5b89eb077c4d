"""Statistics of float streams that were walked before: the next recipe for the same float graph need not see them."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import fx

from ..capture.inputs import Arguments, sample_count
from .resume import fingerprint
from .stages import Stage, cut_into_stages
from .walk import Walk, WalkLog, leading_chunks

Seen = dict[tuple[str, str], Any]  # statistics by value and by what was watched in it
# What these watch depends on the range rule's own options alone. Rules of users' own may look at all of a spec, and
# "auto" compares what comes out of rounded layers.
_RULES = frozenset({"minmax", "moving_average", "percentile", "mse", "histogram_l2", "kl"})


class FloatStatistics:
    """What the values of one model's float streams showed, for one calibration set.

    They depend on the model as the first steps of a recipe leave it, not on bits, placement or rounding. Graphs of the
    same capture are told apart by their code, layers and parameters.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, Seen] = {}

    def of(self, graph: fx.GraphModule) -> Seen:
        """What is known of a graph that no Quantizer was placed in yet; walks add to it."""
        layers = repr([(name, repr(module)) for name, module in graph.named_modules() if name])
        key = hashlib.sha256((graph.code + layers).encode()).hexdigest() + fingerprint(graph, (), "")
        return self._graphs.setdefault(key, {})


class RememberingWalk(Walk):
    """A walk that adds its statistics to ``seen``, or, where all of them are there, takes them from it.

    Then the float stream follows the leading samples alone, those that the quantized one is compared on. The result is
    that of ``Walk``, to the bit.
    """

    def __init__(
        self, graph: fx.GraphModule, batches: list[Arguments], *args: Any, seen: Seen, noise_samples: int, **kwargs: Any
    ) -> None:
        self._seen, self._new = seen, Seen()
        counts = [sample_count(batch) for batch in batches]
        self._samples = sum(counts)
        observed = [stage for stage in cut_into_stages(graph) if stage.observes]
        self._recalls = all(self._key(stage) in seen for stage in observed)
        if self._recalls:
            batches = batches[: leading_chunks(counts, noise_samples)]
        super().__init__(graph, batches, *args, noise_samples=noise_samples, **kwargs)
        self.log.samples = self._samples

    def run(self) -> WalkLog:
        """Walk to the end; a walk that fails leaves nothing behind."""
        log = super().run()
        self._seen.update(self._new)
        return log

    def start_statistic(self, stage: Stage) -> Any:
        """Nothing needs watching where all is known."""
        if not stage.observes or not self._recalls:
            return super().start_statistic(stage)
        self.keep_statistic(stage, self._seen[self._key(stage)])
        return None

    def keep_statistic(self, stage: Stage, statistic: Any) -> None:
        """Keep what was seen for this walk's grid and for later walks."""
        super().keep_statistic(stage, statistic)
        if stage.quantizer is not None and stage.quantizer.spec.range.name in _RULES:
            self._new[self._key(stage)] = statistic

    def _key(self, stage: Stage) -> tuple[str, str]:
        assert stage.quantizer is not None
        spec = stage.quantizer.spec
        watched = (spec.range.model_dump_json(), spec.granularity, spec.axis, self._samples)
        return stage.end.all_input_nodes[0].name, repr(watched)
