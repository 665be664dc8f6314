"""What a sweep's points are, what a search may try, and what is refused before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from llmprune.errors import ConfigError
from llmprune.spec import PruneConfig
from llmprune.sweep_spec import MAX_POINTS, AutoConfig, SweepConfig, values_of


def sweep(base: dict[str, Any] | None = None, **axes: Any) -> SweepConfig:
    """A sweep of the bundled model."""
    return SweepConfig.build(PruneConfig.build(None, **(base or {})), **axes)


def auto(base: dict[str, Any] | None = None, **fields: Any) -> AutoConfig:
    """A search on the bundled model."""
    return AutoConfig.build(PruneConfig.build(None, **(base or {})), **fields)


def test_a_grid_is_every_combination_and_n_to_m_once() -> None:
    """Two methods, two sparsities and 2:4: six jobs, each with its own name."""
    jobs = sweep(methods=("wanda", "sparsegpt"), sparsities=(0.4, 0.6), patterns=("unstructured", "2:4")).jobs()
    assert list(jobs) == ["wanda-0.4", "wanda-0.6", "wanda-2-4", "sparsegpt-0.4", "sparsegpt-0.6", "sparsegpt-2-4"]
    assert [job.sparsity for job in jobs.values()] == [0.4, 0.6, 0.5] * 2
    assert {job.sequential for job in jobs.values()} == {"none"}
    assert sweep(methods="wanda").points() == [PruneConfig(method="wanda", sequential="none")]


def test_points_of_all_axes_share_the_base() -> None:
    """Allocations and efforts too; who names a walk gets it, and where none can be shared there is none."""
    jobs = sweep({"num_samples": 8, "sequential": "group"}, allocations=("uniform", "owl"), sparsities=0.5).jobs()
    assert list(jobs) == ["wanda-0.5", "wanda-0.5-owl"]
    assert all(job.num_samples == 8 and job.sequential == "group" for job in jobs.values())
    jobs = sweep(efforts=("fast", "balanced"), sparsities=0.7).jobs()
    assert list(jobs) == ["sparsegpt-0.7-fast", "alps-0.7-balanced"]
    assert [job.sequential for job in jobs.values()] == ["group", "block"]
    jobs = sweep(methods=("icbs", "wanda"), sparsities=0.5).jobs()
    assert [(name, job.refine) for name, job in jobs.items()] == [("icbs-0.5", "icbs"), ("wanda-0.5", "none")]


def test_combinations_that_no_job_can_have_are_left_out() -> None:
    """A structured method has no zeros to place, and Wanda takes nothing whole; but every value is in some point."""
    jobs = sweep(methods=("wanda", "flap"), patterns=("unstructured", "structured"), sparsities=0.3).jobs()
    assert list(jobs) == ["wanda-0.3", "flap-structured-0.3"]
    jobs = sweep(methods="sparsegpt", patterns=("unstructured", "2:4"), allocations=("uniform", "dp"), sparsities=0.5).jobs()
    assert list(jobs) == ["sparsegpt-0.5", "sparsegpt-0.5-dp", "sparsegpt-2-4"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "a sweep of nothing"),
        ({"methods": ()}, "a sweep of nothing"),
        ({"sparsities": (0.5, 0.5)}, "sparsities names 0.5 twice"),
        ({"methods": "wanda", "sparsities": tuple(index / 200 for index in range(101))}, "101 points, more than 100"),
        (
            {"sparsities": tuple(i / 101 for i in range(101)), "methods": ("x",) * 1 + tuple(map(str, range(100)))},
            "fewer values",
        ),
        ({"sparsities": (1.0,)}, "sparsities.0: Input should be less than 1"),
        ({"methods": "wanda", "patterns": "structured"}, "pattern 'structured' is not for method 'wanda'"),
        ({"patterns": "2:4", "allocations": "owl"}, "has nothing to share"),
        ({"efforts": "huge"}, "effort"),
        ({"method": "wanda"}, "unknown field 'method'; known fields: base, methods"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_sweep_is(fields: dict[str, Any], words: str) -> None:
    """Nothing, too much, the same twice, and what no job can have."""
    with pytest.raises(ConfigError, match=words):
        sweep(**fields).jobs()
    assert MAX_POINTS == 100


def test_two_names_for_one_job_are_refused() -> None:
    """An effort that changes nothing is a duplicate."""
    with pytest.raises(ConfigError, match="are the same job"):
        sweep({"refine": "icbs"}, methods=("icbs", "wanda")).jobs()


@pytest.mark.parametrize(
    "base", [{"effort": "balanced"}, {"pattern": "structured"}, {"method": "icbs"}, {"sparsity": 0.6}], ids=str
)
def test_a_sweep_reads_what_it_writes(base: dict[str, Any]) -> None:
    """As JSON, with the same points: what a preset set is not taken for the user's."""
    config = sweep(base, efforts=("fast",)) if base == {"sparsity": 0.6} else sweep(base, sparsities=(0.3, 0.4))
    read = SweepConfig.model_validate_json(config.model_dump_json())
    assert read.jobs() == config.jobs()


def test_budgets_are_read_as_people_write_them() -> None:
    """Per cent, and bytes with a decimal or a binary unit."""
    config = auto(max_perplexity_increase="5%", max_size="4GB")
    assert config.budgets == {"max_perplexity_increase": 0.05, "max_size": 4e9}
    assert auto(max_size="1.5 GiB").max_size == 3 << 29
    assert auto(max_size=1000).max_size == auto(max_size="1k").max_size == 1000
    assert AutoConfig.model_validate_json(config.model_dump_json()) == config
    assert values_of("wanda, sparsegpt,") == ["wanda", "sparsegpt"] and values_of(None) is None


def test_what_a_search_tries() -> None:
    """Quality alone: unstructured; with a bound on size or speed also what can be smaller and faster, packed."""
    free = auto(max_kl=0.1).families()
    assert [(job.method, job.allocation) for job in free] == [
        ("wanda", "uniform"), ("wanda", "owl"), ("sparsegpt", "uniform"), ("sparsegpt", "owl")
    ]  # fmt: skip
    assert {(job.pattern, job.export, job.sparsity) for job in free} == {("unstructured", "dense", 0.05)}
    config = auto(max_size="1GB", methods=("sparsegpt", "flap"))
    found = [(job.method, job.pattern, job.allocation, job.export) for job in config.families()]
    assert found == [
        ("sparsegpt", "unstructured", "uniform", "packed"), ("sparsegpt", "unstructured", "owl", "packed"),
        ("sparsegpt", "2:4", "uniform", "packed"), ("flap", "structured", "uniform", "dense"),
    ]  # fmt: skip
    assert [config.at(job, 0.4).sparsity for job in config.families()] == [0.4, 0.4, 0.5, 0.4]
    assert [job.pattern for job in auto(min_speedup=1.3, methods=("wanda", "flap")).families()] == ["2:4", "structured"]
    one = auto({"method": "ria", "pattern": "4:8"}, max_kl=0.1).families()
    assert [(job.method, job.pattern) for job in one] == [("ria", "4:8")]


@pytest.mark.parametrize(
    ("base", "fields", "words"),
    [
        ({}, {}, "no budget"),
        ({}, {"max_perplexity_increase": 5}, "less than or equal to 1"),
        ({}, {"max_perplexity_increase": "-1%"}, "greater than or equal to 0"),
        ({}, {"max_perplexity_increase": "five%"}, "valid number"),
        ({}, {"max_size": "4 elephants"}, "max_size"),
        ({}, {"min_speedup": 0.5}, "min_speedup"),
        ({"sparsity": 0.5}, {"max_kl": 0.1}, "auto finds the sparsity"),
        ({"eval": ()}, {"max_kl": 0.1}, "no text to evaluate on"),
        ({"latency": False}, {"min_speedup": 1.3}, "Drop --no-latency"),
        ({"export": "dense"}, {"max_size": "1GB", "patterns": ("unstructured", "2:4")}, "zeros in dense tensors"),
        ({}, {"min_speedup": 1.3, "patterns": "unstructured"}, "unstructured zeros run no faster"),
        ({}, {"max_kl": 0.1, "min_sparsity": 0.6, "max_sparsity": 0.5}, "not below"),
        ({}, {"max_kl": 0.1, "methods": "wanda", "patterns": "structured"}, "not for method 'wanda'"),
    ],
    ids=str,
)
def test_budgets_that_cannot_be(base: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    """Refused before anything is read, with the remedy."""
    with pytest.raises(ConfigError, match=words):
        auto(base, **fields).families()
