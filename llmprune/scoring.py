"""The stages ``dense`` and ``pruned``: perplexity of every text, divergence from the dense model, speed, continuations."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.anatomy.blocks import Stack
from llmprune.continuations import Continued
from llmprune.engines.sharding import Shares
from llmprune.events import Event, Progress, Stage, Warned
from llmprune.hidden import HiddenStates
from llmprune.io.text import TokenSet
from llmprune.measure.dispatch import dispatched
from llmprune.measure.latency import measure_speed
from llmprune.measure.quality import Forward, Keep, against, as_events, mean_of, replay_head, score_text
from llmprune.measure.quality import Scores as TextScores
from llmprune.measure.streamed import NO_SPEED, is_streamed, score_streamed
from llmprune.measure.tasks import Tasks
from llmprune.measure.writing import Prompts, write_all
from llmprune.report import Quality, Speed, TaskReport
from llmprune.spec import Offload


@dataclass(frozen=True)
class Scores:
    """What one stage measured.

    Attributes:
        quality: one for each text.
        speed: empty where none was asked for.
        hidden: of the dense model the head's inputs [N, S, H], by text and batch: its logits, at a fraction of their size.
        written: after each prompt; empty where there was none.
        tasks: None where there are none.
    """

    quality: tuple[Quality, ...]
    speed: tuple[Speed, ...]
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    written: tuple[Continued, ...] = ()
    tasks: TaskReport | None = None


@dataclass(frozen=True)
class Scoring:
    """How a job measures its model; S tokens a sequence.

    Attributes:
        texts: to evaluate on.
        prompt_1S: what speed is measured with; None measures none.
        offload: where hidden states wait between blocks when the model is scored block by block.
        folder: the directory of their files.
        shares: of several processes what this one does: some of the windows. None where it is alone.
        tokenizer: of the text that it goes on with, and of the tasks.
        prompts: what it is to go on with.
        tasks: what it is to be examined in.
    """

    model: PreTrainedModel
    stack: Stack
    texts: Sequence[TokenSet]
    device: torch.device
    prompt_1S: Tensor | None
    offload: Offload = "auto"
    folder: Path | None = None
    shares: Shares | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    prompts: Prompts | None = None
    tasks: Tasks | None = None

    @property
    def streamed(self) -> bool:
        """Whether the model is too large to be run as a whole."""
        return is_streamed(self.model, self.stack, self.device)

    @property
    def num_windows(self) -> int:
        """Steps of a stage: the windows that are this process's own."""
        return sum(len(self._windows(text)) for text in self.texts)

    def run(self, stage: Stage, dense: Scores | None = None) -> Generator[Event, None, Scores]:
        """Measure the model as it is; against the dense one where its scores are given. Progress of the stage."""
        offset = 0
        quality: list[Quality] = []
        hidden: dict[str, Tensor] = {}
        speed: tuple[Speed, ...] = ()
        written: tuple[Continued, ...] = ()
        tasks: TaskReport | None = None
        streamed = self.streamed
        with nullcontext() if streamed else dispatched(self.model, self.device):
            for number, text in enumerate(self.texts):
                keep = None if dense else HiddenStates((), "disk" if self.offload == "disk" else "device", self.folder)
                reference = self._reference(dense.hidden, number) if dense else None
                ids_NS = self._windows(text)
                scoring = self._score(ids_NS, reference, keep, streamed=streamed)
                steps = as_events(scoring, stage, text.report.source, offset=offset, total=self.num_windows)
                scores = yield from (scores_of_all(self.shares, steps, len(ids_NS)) if self.shares else steps)
                offset += len(ids_NS)
                hidden |= {_key(number, batch): tensor for batch, tensor in enumerate(keep or ())}
                if dense:
                    quality.append(against(dense.quality[number], scores))
                else:
                    quality.append(Quality(text=text.report, perplexity_dense=scores.perplexity, seconds_dense=scores.seconds))
            if self.prompt_1S is not None and streamed:
                if not dense:
                    yield Warned(message=NO_SPEED)
            elif self.prompt_1S is not None:
                yield Progress(stage=stage, done=self.num_windows, total=self.num_windows, detail="latency")
                speed = measure_speed(self.model, self.prompt_1S)
            if self.prompts is not None and self.tokenizer is not None and not streamed:
                yield Progress(stage=stage, done=self.num_windows, total=self.num_windows, detail="continuations")
                written = write_all(self.model, self.tokenizer, self.prompts)
            if self.tasks is not None and self.tokenizer is not None and not streamed:
                tasks = yield from self.tasks.run(self.model, self.tokenizer, stage, self.num_windows)
        return Scores(tuple(quality), speed, hidden, written, tasks)

    def _score(
        self, ids_NS: Tensor, reference: Forward | None, keep: Keep | None, *, streamed: bool
    ) -> Generator[int, None, TextScores]:
        if not streamed:
            return score_text(self.model, ids_NS, dense=reference, keep=keep)
        return score_streamed(
            self.model, self.stack, ids_NS, self.device, dense=reference, keep=keep, offload=self.offload, folder=self.folder
        )

    def _windows(self, text: TokenSet) -> Tensor:
        """The windows of a text that this process scores."""
        return self.shares.part(text.ids_NS) if self.shares else text.ids_NS

    def _reference(self, hidden: Mapping[str, Tensor], number: int) -> Forward:
        """The dense model's logits on text ``number``, from its final hidden states."""
        return lambda batch, ids_NS: replay_head(self.model, self.stack, ids_NS, hidden[_key(number, batch)])


def _key(number: int, batch: int) -> str:
    return f"{number:03d}.{batch:06d}"


def scores_of_all(
    shares: Shares, steps: Generator[Event, None, TextScores], num_windows: int
) -> Generator[Event, None, TextScores]:
    """The scores of a whole text from those of every process's windows, which have the same number of tokens each."""

    def own() -> Generator[Event, None, tuple[int, TextScores | None]]:
        return num_windows, ((yield from steps) if num_windows else None)

    found = yield from shares.gathered(own())
    return mean_of([(count, scores) for count, scores in found if scores is not None])
