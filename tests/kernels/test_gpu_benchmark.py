"""The script of a GPU visit, as far as a CPU can tell: its checks find what is wrong, and then it reports no speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import gpu_checks, gpu_kernels, gpu_times
from benchmarks.gpu_checks import Case, Outcome
from llmprune_kernels import dispatch, tuning

CPU = torch.device("cpu")


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the cases, for tests that are not about them."""
    monkeypatch.setattr(gpu_checks, "cases", lambda small: [Case(op, "bfloat16", (37, 300), 5) for op in dispatch.OPS[:2]])


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And does nothing: an empty result is no result."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_kernels.main(["--out", str(tmp_path)]) == 2
    assert "no GPU: nothing was checked and nothing was measured" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("few_cases")
def test_dry_run_goes_through_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Checks, times, model and table; keeps nothing, judges nothing, and leaves the launchers as they were."""
    before = {op: dict(launchers) for op, launchers in dispatch.LAUNCHERS.items()}
    assert gpu_kernels.main(["--dry-run", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "checks are green" in out
    for word in ("2:4 int8", "bitmask 70 %", "cuBLAS", "packed  decode", "prefill", "dry run: these times"):
        assert word in out
    assert out.count("| dry run |") == len(gpu_kernels.TARGETS)
    assert not [*tmp_path.iterdir()]
    assert before == dispatch.LAUNCHERS


@pytest.mark.usefixtures("few_cases")
def test_check_only_times_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Green is said, and no microsecond."""
    assert gpu_kernels.main(["--dry-run", "--check-only"]) == 0
    out = capsys.readouterr().out
    assert "checks are green" in out
    assert "cuBLAS" not in out


@pytest.mark.parametrize(
    "outcomes", [[], [Outcome("fine", 1e-3), Outcome("linear_24 ...", red="largest error 7")]], ids=["none", "one red"]
)
def test_no_speed_while_a_check_is_red(
    outcomes: list[Outcome], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor where nothing was checked at all: exit code 1, no times, no file."""
    monkeypatch.setattr(gpu_checks, "run_all", lambda *a, **k: outcomes)
    assert gpu_kernels.main(["--dry-run", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "No speed is reported." in out
    assert "cuBLAS" not in out
    assert [("largest error 7" in out), *tmp_path.iterdir()] == [bool(outcomes)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * 1.05, "error"),
        (lambda y: torch.where(torch.arange(y.numel()).view_as(y) == 3, float("nan"), y), "error"),
        (lambda y: torch.where(torch.arange(y.numel()).view_as(y) == 3, y + 1, y), "largest error"),
        (lambda y: y[:, :-1], "instead of"),
        (lambda y: y.float(), "instead of"),
        (lambda y: y * (1 + 0.003 * torch.rand(())), "second run"),
    ],
    ids=["scaled", "nan", "one", "cut", "dtype", "random"],
)
def test_checks_find_what_is_wrong(spoil: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that is a little wrong, wrong in one place, of another shape or dtype, or not the same twice."""
    case = Case("linear_24_mma", "bfloat16", (128, 512), 40)
    assert gpu_checks.check(case, CPU).red == ""
    error = gpu_checks.check(case, CPU).error
    assert error is not None
    assert 5e-4 < error < gpu_checks.MAX_RELATIVE_ERROR
    original = gpu_checks.multiply
    monkeypatch.setattr(gpu_checks, "multiply", lambda *arguments: spoil(original(*arguments)))
    assert message in gpu_checks.check(case, CPU).red


def test_an_exception_is_red() -> None:
    """It does not end the visit."""
    outcomes = gpu_checks.check_all([Case("linear_24", "bfloat16", (16, 256), 1, kernel="warp")] * 2, "cpu")
    assert [outcome.red[:8] for outcome in outcomes] == ["KeyError"] * 2


def test_all_ops_tiles_and_dtypes_are_cases() -> None:
    """Every op in every dtype it takes, awkward shapes and real ones, and each tile of each kernel."""
    everything = [*gpu_checks.cases(small=False)]
    assert len(everything) > 1000
    assert {case.op for case in everything} == set(dispatch.OPS)
    assert {case.shape for case in everything} >= {*gpu_checks.AWKWARD, *gpu_checks.REAL}
    tiles = {(case.kernel, str(case.tiles)) for case in everything if case.kernel}
    for op in dispatch.OPS:
        for choice in tuning.candidates(op, 8, 1024, 4096, 132):
            assert (choice.kernel, str(dict(choice.tiles))) in tiles
    assert {case.density for case in everything if case.op == "linear_bitmask"} == {0.5, 0.2}


def test_layers_are_checked_too() -> None:
    """Moved, laid out, saved and fused: green on a CPU."""
    outcomes = gpu_checks.check_modules("cpu")
    assert [outcome for outcome in outcomes if outcome.red] == []
    assert {"layers fuse", "fused layers, 1 tokens", "an int8 layer"} <= {outcome.name for outcome in outcomes}


def test_cases_run_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; every case comes back."""
    few = [Case(op, "bfloat16", (16, 256), 2) for op in dispatch.OPS]
    monkeypatch.setattr(gpu_checks, "cases", lambda small: few)
    outcomes = gpu_checks.run_all("cpu", num_workers=1)
    assert {case.name for case in few} <= {outcome.name for outcome in outcomes}
    assert not [outcome for outcome in outcomes if outcome.red]


def test_a_row_counts_the_bytes_that_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """9/16 of the dense weight and the activations, over the time; a clock that is exact makes it exact."""
    clock = gpu_times.Clock(CPU, lambda thunks: 2.0, rotation_bytes=1)
    monkeypatch.setattr(tuning, "candidates", lambda *product: [dispatch.Choice("reference")])
    rows, entries = gpu_times.time_two_four(clock, ((64, 512),), (4,), say=lambda text: None)
    weight_bytes, activations = 64 * 512 * 2, 2 * 4 * (512 + 64)
    assert rows[0]["tbs"] == pytest.approx((weight_bytes * 9 / 16 + activations) / 2.0 / 1e6)
    assert rows[0]["cublas_tbs"] == pytest.approx((weight_bytes + activations) / 2.0 / 1e6)
    assert rows[0]["speedup"] == 1.0
    assert [*entries] == [dispatch.key("linear_24_mma", 4, 64, 512, torch.bfloat16)]
    assert gpu_times.copy_bandwidth(clock, 4000) == pytest.approx(8000 / 2.0 / 1e6)


def test_the_verdict_compares_with_must_and_aim() -> None:
    """The worst of the rows counts; smaller is better for errors; what was not measured is not claimed."""

    def row(shape: tuple[int, int], num_tokens: int, speedup: float) -> dict[str, Any]:
        names = ("kind", "out_features", "in_features", "num_tokens", "speedup", "tbs")
        return dict(zip(names, ("2:4", *shape, num_tokens, speedup, 3.5), strict=True))

    square, wide = gpu_kernels.SQUARE, gpu_kernels.WIDE
    result = {
        "dry_run": False, "worst_error": 3e-3, "model": {"speedups": {"decode_seconds": 1.6}},
        "rows": [row(square, 1, 1.9), row(square, 8, 1.2), row(wide, 1, 1.6), row(wide, 8, 2.0)],
    }  # fmt: skip
    verdicts = [line.rsplit("|", 2)[1].strip() for line in gpu_kernels.verdict_table(result).splitlines()[2:]]
    assert verdicts == ["MISSED", "must", "must", "not measured", "not measured", "aim", "not measured", "MISSED"]
    assert json.dumps(result)


def test_dense_weights_of_the_checks_are_exact() -> None:
    """What the packed tensors stand for, against a product by hand."""
    for op in dispatch.OPS:
        weights = tuning.random_weights(op, 24, 260, torch.bfloat16, CPU)
        weight_OI = gpu_checks.dense_double(op, weights, (24, 260), torch.bfloat16)
        x_TI = torch.randn(3, 260).bfloat16()
        y: Tensor = gpu_checks.multiply(Case(op, "bfloat16", (24, 260), 3), x_TI, weights, None)
        torch.testing.assert_close(y.double(), x_TI.double() @ weight_OI.T, rtol=1e-2, atol=0.1)
