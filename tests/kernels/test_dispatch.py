"""The choice of kernels: the heuristic's statements, the table on disk, and tuning with a clock that is not a GPU's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune_kernels import dispatch, tuning
from llmprune_kernels.dispatch import BUCKETS, Call, Choice, Gpu

H200 = Gpu("NVIDIA H200", (9, 0), 132, 50 * 2**20, "3.6.0")
TINY = H200._replace(l2_bytes=2**12)
CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test has a cache of its own."""
    monkeypatch.setenv("LLMPRUNE_KERNEL_CACHE", str(tmp_path / "kernels"))
    dispatch._choose.cache_clear()
    yield tmp_path / "kernels"
    dispatch._choose.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """`choose` believes that there is an H200."""
    monkeypatch.setattr(dispatch, "describe", lambda device: H200)
    return H200


def on_gpu(op: str, num_tokens: int, out_features: int = 4096, in_features: int = 4096) -> Choice:
    return dispatch.choose(op, num_tokens, out_features, in_features, BF16, torch.device("cuda", 0))


@pytest.mark.parametrize("op", dispatch.OPS)
def test_anything_but_cuda_gets_the_reference(op: str) -> None:
    """And CUDA is not asked."""
    assert dispatch.choose(op, 1, 16, 256, BF16, CPU) == Choice("reference")
    assert dispatch.choose(op, 1, 16, 256, BF16, torch.device("meta")).kernel == "reference"
    assert not torch.cuda.is_initialized()


def test_an_op_that_is_none() -> None:
    """The error names those that are."""
    with pytest.raises(ValueError, match=r"no op 'linear_48'; choose one of linear_24, linear_24_mma"):
        dispatch.choose("linear_48", 1, 16, 256, BF16, CPU)


@pytest.mark.parametrize(
    ("op", "few", "many"),
    [
        ("linear_24", "expand", "dense"),
        ("linear_24_mma", "mma_sp", "dense"),
        ("linear_24_int8", "mma_sp_int8", "dense"),
        ("linear_bitmask", "bitmask", "dense"),
    ],
)
def test_few_tokens_are_multiplied_sparsely_and_many_densely(op: str, few: str, many: str, gpu: Gpu) -> None:
    """The heuristic's border is at 128 tokens."""
    assert [on_gpu(op, count).kernel for count in (1, 7, 64, 128)] == [few] * 4
    assert [on_gpu(op, count).kernel for count in (129, 4096, 100_000)] == [many] * 3


def test_without_triton_pytorch_multiplies() -> None:
    """A CUDA machine without Triton still computes."""
    for op in dispatch.OPS:
        assert dispatch.heuristic(op, 1, 4096, 4096, H200._replace(triton="")) == Choice("reference")


def compiled_tiles() -> list[dict[str, int]]:
    """What the mma.sp kernel says that it has code for without spills."""
    kernel = pytest.importorskip("llmprune_kernels.kernels.mma_sp", reason="needs Triton", exc_type=ImportError)
    return [{name: size for name, size in tile._asdict().items() if name != "splits"} for tile in kernel.TILES]


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16, 17, 32, 64, 100, 128])
@pytest.mark.parametrize("shape", [(16, 256), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)])
def test_tiles_of_the_heuristic(shape: tuple[int, int], num_tokens: int) -> None:
    """Tokens are covered in tiles of 8, no SM idles for the sake of row tiles, and small layers are split."""
    out_features, in_features = shape
    choice = dispatch.heuristic("linear_24_mma", num_tokens, out_features, in_features, H200)
    tiles = choice.tiles
    assert tiles["token_tiles"] in (1, 2, 4, 8)
    assert tiles["token_tiles"] * 8 >= min(num_tokens, 64)
    assert tiles["row_tiles"] in (1, 2, 4)
    assert tiles["row_tiles"] * tiles["token_tiles"] <= 16
    num_blocks = -(-out_features // 16)
    assert tiles["row_tiles"] == 1 or num_blocks // tiles["row_tiles"] >= H200.num_sms
    assert tiles["splits"] == 1 or tiles["splits"] * tiles["num_warps"] <= in_features // 256
    if shape == (1024, 4096):
        assert tiles["splits"] > 1
    assert {name: size for name, size in tiles.items() if name != "splits"} in compiled_tiles()
    if shape == (14336, 4096) and num_tokens == 16:
        assert tiles["row_tiles"] == 2


def test_token_counts_are_bucketed() -> None:
    """Rounded up to a power of two, the last one is for all that is more."""
    assert [dispatch.bucket(count) for count in (1, 2, 3, 5, 8, 9, 4096, 4097, 10**6)] == [1, 2, 4, 8, 8, 16, 4096, 4096, 4096]
    assert tuple(2**power for power in range(13)) == BUCKETS


def test_a_measured_choice_goes_before_the_heuristic(gpu: Gpu) -> None:
    """Only for its op, shape, dtype and token count."""
    assert on_gpu("linear_24_mma", 5).kernel == "mma_sp"
    key = dispatch.key("linear_24_mma", 5, 4096, 4096, BF16)
    dispatch.write_table(gpu, {key: {"kernel": "dense", "tiles": {}, "microseconds": 1.0}})
    assert on_gpu("linear_24_mma", 5) == Choice("dense", {})
    assert on_gpu("linear_24_mma", 8) == Choice("dense", {})
    assert on_gpu("linear_24_mma", 9).kernel == "mma_sp"
    assert on_gpu("linear_24_mma", 8, 4096, 8192).kernel == "mma_sp"
    assert dispatch.choose("linear_24_mma", 5, 4096, 4096, torch.float16, torch.device("cuda", 0)).kernel == "mma_sp"


def test_tables_are_kept_per_gpu_and_versions(folder: Path) -> None:
    """Name, capability, Triton and package version are in the file's name and in its header."""
    path = dispatch.write_table(H200, {"a": {}})
    others = [H200._replace(name="NVIDIA A100"), H200._replace(capability=(10, 0)), H200._replace(triton="3.9.0")]
    assert len({path, *map(dispatch.table_path, others)}) == 4
    assert path.name.startswith("nvidia-h200-sm90-triton-3.6.0-llmprune-")
    assert path.parent == folder
    header = json.loads(path.read_text())["header"]
    assert header["gpu"] == "NVIDIA H200"
    assert header["package"] == dispatch.package_version()


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LLMPRUNE_KERNEL_CACHE, XDG_CACHE_HOME, ~/.cache: in this order."""
    monkeypatch.delenv("LLMPRUNE_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert dispatch.table_path(H200).parent == tmp_path / "xdg" / "llmprune" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dispatch.table_path(H200).parent == tmp_path / ".cache" / "llmprune" / "kernels"


def test_writing_merges_and_leaves_no_half_file(folder: Path) -> None:
    """Entries of before stay; nothing but the table is left in the folder."""
    dispatch.write_table(H200, {"a": {"kernel": "dense"}, "b": {"kernel": "dense"}})
    dispatch.write_table(H200, {"b": {"kernel": "mma_sp"}})
    assert dispatch.read_table(H200) == {"a": {"kernel": "dense"}, "b": {"kernel": "mma_sp"}}
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"header": {}}', '{"entries": 1}', "\0\xff"])
def test_a_damaged_table_is_ignored_with_a_warning(text: str, gpu: Gpu) -> None:
    """The heuristic chooses, and writing mends it."""
    path = dispatch.table_path(gpu)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"is ignored"):
        assert on_gpu("linear_24_mma", 1).kernel == "mma_sp"
    with pytest.warns(UserWarning, match=r"is ignored"):
        dispatch.write_table(gpu, {"a": {}})
    assert dispatch.read_table(gpu) == {"a": {}}


def test_a_foreign_table_is_ignored_with_a_warning(gpu: Gpu) -> None:
    """One that was copied from another GPU, whatever its name."""
    path = dispatch.write_table(gpu._replace(name="NVIDIA A100"), {})
    path.rename(dispatch.table_path(gpu))
    with pytest.warns(UserWarning, match="another GPU or version"):
        assert dispatch.read_table(gpu) == {}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        {},
        {"kernel": "warp"},
        {"kernel": "expand", "tiles": {}},
        {"kernel": "dense", "tiles": {"a": "x"}},
        {"kernel": "dense"},
    ],
)
def test_an_entry_that_names_no_kernel_is_ignored(entry: Any, gpu: Gpu) -> None:
    """With a warning, and the heuristic instead."""
    dispatch.write_table(gpu, {dispatch.key("linear_24_mma", 1, 4096, 4096, BF16): entry})
    if entry is None:
        assert on_gpu("linear_24_mma", 1).kernel == "mma_sp"
        return
    with pytest.warns(UserWarning, match="no kernel of linear_24_mma"):
        assert on_gpu("linear_24_mma", 1).kernel == "mma_sp"


class Clock:
    """A measure: what a launch costs is looked up by what was launched."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, op: str, costs: dict[str, float], *, broken: Sequence[str] = ()
    ) -> None:
        self.costs, self.last, self.num_sets = costs, "", 0
        launchers = dict(dispatch.LAUNCHERS[op])
        for kernel in ("dense", *{name.split()[0] for name in (*costs, *broken)}):
            launchers[kernel] = self._stand_in(kernel, launchers["reference"], broken)
        monkeypatch.setitem(dispatch.LAUNCHERS, op, launchers)

    def _stand_in(self, kernel: str, reference: dispatch.Launcher, broken: Sequence[str]) -> dispatch.Launcher:
        def launch(call: Call) -> torch.Tensor:
            self.last = f"{kernel} {call.tiles.get('row_tiles', '')}".strip()
            if self.last in broken:
                raise RuntimeError("out of resource: registers")
            y_TO = reference(call)
            return y_TO * 2 if self.costs[self.last] < 0 else y_TO

        return launch

    def __call__(self, thunks: Sequence[tuning.Thunk]) -> float:
        thunks[0]()
        self.num_sets = len(thunks)
        return self.costs[self.last]


@pytest.fixture
def three_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates are dense and three row tiles of the sparse kernel."""
    monkeypatch.setattr(tuning, "_tiles", lambda kernel, num_tokens: [{"row_tiles": count} for count in (1, 2, 4)])


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.usefixtures("three_tiles")
def test_tuning_keeps_the_fastest(op: str, monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    """And choose finds it in the table; the weights measured on exceed the L2 together."""
    kernel = dispatch.KERNELS[op]
    clock = Clock(monkeypatch, op, {"dense": 9, f"{kernel} 1": 7, f"{kernel} 2": 5, f"{kernel} 4": 6})
    entries = tuning.tune(
        [(32, 256)], op=op, device=CPU, token_counts=(3, 4, 200), measure=clock, gpu=H200._replace(l2_bytes=2**14)
    )
    assert set(entries) == {dispatch.key(op, count, 32, 256, BF16) for count in (4, 256)}
    assert entries[dispatch.key(op, 4, 32, 256, BF16)] == {
        "kernel": kernel, "tiles": {"row_tiles": 2}, "microseconds": 5, "dense_microseconds": 9
    }  # fmt: skip
    set_bytes = sum(tensor.nbytes for tensor in tuning.random_weights(op, 32, 256, BF16, CPU))
    assert clock.num_sets * set_bytes > 0.9 * 4 * 2**14
    monkeypatch.setattr(dispatch, "describe", lambda device: H200)
    assert on_gpu(op, 3, 32, 256) == Choice(kernel, {"row_tiles": 2})


@pytest.mark.usefixtures("three_tiles")
def test_tuning_passes_over_what_fails_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of all is wrong, the next does not compile: the third is chosen, with warnings."""
    costs = {"dense": 9.0, "mma_sp 1": -1.0, "mma_sp 4": 6.0}
    clock = Clock(monkeypatch, "linear_24_mma", costs, broken=["mma_sp 2"])
    with pytest.warns(UserWarning) as warned:
        entries = tuning.tune([(32, 256)], device=CPU, token_counts=(1,), measure=clock, gpu=TINY)
    assert [entry["tiles"] for entry in entries.values()] == [{"row_tiles": 4}]
    texts = sorted(str(warning.message) for warning in warned)
    assert ["is wrong here" in texts[0], "registers" in texts[1], len(texts)] == [True, True, 2]


@pytest.mark.usefixtures("three_tiles")
def test_tuning_prefers_dense_where_sparse_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no wish in a table."""
    clock = Clock(monkeypatch, "linear_24_mma", {"dense": 3, "mma_sp 1": 7, "mma_sp 2": 5, "mma_sp 4": 6})
    entries = tuning.tune([(32, 256), (16, 256), (32, 256)], device=CPU, token_counts=(64,), measure=clock, gpu=TINY)
    assert [entry["kernel"] for entry in entries.values()] == ["dense", "dense"]


@pytest.mark.usefixtures("three_tiles")
def test_tuning_where_nothing_runs_writes_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heuristic stays in charge."""
    clock = Clock(monkeypatch, "linear_24_mma", {}, broken=["dense", "mma_sp 1", "mma_sp 2", "mma_sp 4"])
    with pytest.warns(UserWarning, match="fails here"):
        assert tuning.tune([(32, 256)], device=CPU, token_counts=(1,), measure=clock, gpu=TINY) == {}


def test_candidates_split_where_rows_leave_sms_idle() -> None:
    """Never into more parts than the warps have columns for; the dense product is always tried, and first."""
    pytest.importorskip("triton")
    narrow = tuning.candidates("linear_24_mma", 1, 1024, 4096, 132)
    wide = tuning.candidates("linear_24_mma", 1, 28672, 4096, 132)
    assert narrow[0] == wide[0] == Choice("dense")
    assert {choice.tiles["splits"] for choice in narrow[1:]} == {1, 2, 4}
    assert {choice.tiles["splits"] for choice in wide[1:]} == {1}
    assert all(choice.tiles["splits"] * choice.tiles["num_warps"] <= 16 for choice in narrow[1:])
    assert tuning.candidates("linear_24_mma", 4096, 1024, 4096, 132) == [Choice("dense")]
    assert len(tuning.candidates("linear_24", 1, 1024, 4096, 132)) > 3
    assert len(tuning.candidates("linear_bitmask", 1, 1024, 4096, 132)) > 3


def test_cusparselt_is_not_offered_without_cuda() -> None:
    """It is asked for the device at hand only."""
    assert not tuning.has_cusparselt(CPU)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_random_weights_are_what_the_op_takes(op: str) -> None:
    """The reference accepts them, and about half the weights are kept."""
    weights = tuning.random_weights(op, 24, 264, BF16, CPU)
    y = dispatch.launch(op, Choice("reference"), torch.randn(2, 264).to(BF16), weights, None, 24)
    assert y.shape == (2, 24)
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ({}, 1024),
        ({4096: (10.0, 20.0)}, 4096),
        ({4096: (10.0, 20.0), 2048: (9.0, 9.5), 1024: (8.0, 7.0), 512: (1.0, 2.0)}, 2048),
        ({4096: (20.0, 10.0), 2048: (1.0, 2.0)}, None),
    ],
)
def test_cusparselt_is_used_from_where_it_was_always_faster(
    times: dict[int, tuple[float, float]], wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the first measurement that it lost, not at all; 1024 tokens where nothing was measured."""
    monkeypatch.setattr(tuning, "describe", lambda device: H200)
    entries = {
        dispatch.key("linear_24_mma", count, 64, 256, BF16): {"cusparselt_microseconds": theirs, "microseconds": ours}
        for count, (theirs, ours) in times.items()
    }
    dispatch.write_table(H200, entries)
    assert tuning.cusparselt_from(64, 256, BF16, torch.device("cuda", 0)) == wanted


@pytest.mark.usefixtures("three_tiles")
def test_tuning_measures_cusparselt_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 64 tokens on, and beside the choice, which it does not change."""
    monkeypatch.setattr(tuning, "compress", lambda weight_OI: weight_OI)
    clock = Clock(monkeypatch, "linear_24_mma", {"dense": 9, "mma_sp 1": 7, "mma_sp 2": 5, "mma_sp 4": 6})
    shapes, counts = [(32, 256)], (1, 64)
    entries = tuning.tune(shapes, device=CPU, token_counts=counts, cusparselt=True, measure=clock, gpu=TINY)
    assert [("cusparselt_microseconds" in entry, entry["microseconds"]) for entry in entries.values()] == [
        (False, 5),
        (True, 5),
    ]
