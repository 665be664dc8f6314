"""lm-evaluation-harness played by a few lines, for tests where it is not installed."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch


class StandIn:
    """The modules that llmprune imports of it. The score of every task is the mean of the model's logits on two tokens.

    Attributes:
        all_tasks: those that there are.
        asked: task and limit of each evaluation.
        is_reachable: whether the hub answers.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *all_tasks: str) -> None:
        self.all_tasks = all_tasks
        self.asked: list[tuple[str, int | None]] = []
        self.is_reachable = True
        contents: dict[str, dict[str, Any]] = {
            "lm_eval": {"simple_evaluate": self.evaluate},
            "lm_eval.tasks": {"TaskManager": lambda **_: self},
            "lm_eval.api": {},
            "lm_eval.api.task": {"tqdm": iter},
            "lm_eval.models": {},
            "lm_eval.models.huggingface": {"HFLM": Subject},
        }
        for name, content in contents.items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("llmprune.measure.tasks.version", lambda name: "9.9")

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.all_tasks]

    def load(self, names: list[str]) -> None:
        if not self.is_reachable:
            raise ConnectionError("no route")

    def evaluate(self, subject: Any, *, tasks: list[str], limit: int | None, **_: Any) -> dict[str, Any]:
        self.asked.append((tasks[0], limit))
        with torch.no_grad():
            value = float(subject.pretrained(input_ids=torch.tensor([[5, 6]])).logits.mean())
        return {"results": {tasks[0]: {"mean,none": value, "mean_stderr,none": 0.1}}, "n-samples": {tasks[0]: {"effective": 2}}}


class Subject:
    """Keeps what it is made of."""

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)
