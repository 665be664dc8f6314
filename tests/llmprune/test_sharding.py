"""What several processes tell one another in a walk: sums, weights, groups of sites, errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import forked
from llmprune.anatomy.sites import Site
from llmprune.engines.sharding import Shares, _dealt
from llmprune.errors import ConfigError, LlmpruneError, NonFiniteError, ProcessLost
from llmprune.launching import _verdict, check_count, wanted
from llmprune.processes import LOST_EXIT_CODE, together
from llmprune.report import SiteReport
from llmprune.spec import Need
from llmprune.stats import LinearStats

CPU = torch.device("cpu")
SIZE = 3


def inputs(name: str, rank: int) -> Tensor:
    """Tokens [T, 4] that a site has in a process: expert a none in the first, b none in the last, c in the second alone."""
    seen = {"first": (5, 2, 3), "second": (5, 2, 3), "a": (0, 4, 1), "b": (2, 3, 0), "c": (0, 6, 0)}
    same = "first" if name == "second" else name
    return torch.randn(seen[name][rank], 4, generator=torch.Generator().manual_seed(10 * ord(same[0]) + rank))


def sites() -> dict[str, Site]:
    """Two that share an input, and three experts that are modules of their own."""
    return {name: Site(name, nn.Linear(4, 2), "weight") for name in ("first", "second", "a", "b", "c")}


def _work() -> None:
    """All of it in one launch; an assertion that fails ends this process."""
    rank = torch.distributed.get_rank()
    shares = Shares.of(CPU)
    assert (shares.rank, shares.size) == (rank, SIZE)

    parts = [torch.randn(7, 5, generator=torch.Generator().manual_seed(one)) for one in range(SIZE)]
    total = parts[rank].clone()
    shares.sum_(total)
    assert torch.equal(total, sum(part.double() for part in parts).float())  # type: ignore[union-attr]
    turned = parts[rank].clone().T
    shares.sum_(turned)
    assert torch.equal(turned, total.T)

    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
        for given in (torch.arange(6).reshape(2, 3), torch.tensor(5)):
            own = (given * (rank + 1)).to(dtype)
            shares.give_(own, 1)
            assert torch.equal(own, (given * 2).to(dtype)), dtype

    def collect(names: Mapping[str, Site], whole: bool) -> dict[str, LinearStats]:
        found: dict[str, LinearStats] = {}
        for name in names:
            x_TI = inputs(name, rank)
            if not len(x_TI):
                continue
            if found and name == "second":
                found[name] = found["first"]
                continue
            if found and not whole:
                break  # another input: the group is complete
            found[name] = LinearStats(4, Need.GRAM, "cpu")
            found[name].update(x_TI)
        return found

    pending, groups = sites(), []
    while pending:
        merged = shares.merged(pending, collect, whole=False, need=Need.GRAM)
        if not merged:
            break
        groups.append(list(merged))
        for name, stats in merged.items():
            x_TI = torch.cat([inputs(name, one) for one in range(SIZE)])
            assert stats.num_tokens == len(x_TI), name
            torch.testing.assert_close(stats.gram_II, x_TI.T @ x_TI)
            torch.testing.assert_close(stats.sq_I, x_TI.square().sum(0))
            del pending[name]
        assert "first" not in merged or merged["first"] is merged["second"]
    assert groups == [["first", "second"], ["b"], ["a"], ["c"]]  # b is what the first process meets first

    work = sites()

    def prune(site: Site, _stats: LinearStats | None) -> SiteReport:
        site.weight_OI.fill_(len(site.name))
        return SiteReport(name=site.name, shape=site.shape, numel=8, num_zeros=rank)

    reports = shares.pruned([(site, None) for site in work.values()], prune)
    assert [report.name for report in reports] == list(work)
    assert {report.num_zeros for report in reports} == set(range(SIZE))  # each process had some
    assert all(bool((site.stored == len(name)).all()) for name, site in work.items())

    assert shares.together(lambda: rank * 2) == [0, 2, 4]

    def fail() -> None:
        if rank == 2:
            raise NonFiniteError("block 7")
        if rank == 1:
            raise ValueError("a bug")

    with pytest.raises(ValueError if rank == 1 else LlmpruneError, match="a bug") as error:
        shares.together(fail)  # the lowest one's word counts
    assert rank == 1 or getattr(error.value, "told", False)
    with pytest.raises(NonFiniteError, match="block 7"):
        shares.together(lambda: fail() if rank == 2 else None)
    with pytest.raises(ConfigError, match="3 processes need a calibration sequence each, got 2"):
        shares.rows(torch.zeros(2, 5))
    assert shares.rows(torch.arange(7)[:, None]).flatten().tolist() == [[0, 3, 6], [1, 4], [2, 5]][rank]
    batches, own = shares.batches(torch.arange(7)[:, None], 2)
    assert [batch.flatten().tolist() for batch in batches] == [[[0], [3], [6]], [[1], [4]], [[2], [5]]][rank]
    assert own == [[0, 1, None, 2], [0, None, 1, None], [None, 0, 1, None]][rank]
    assert shares.mean([2, 0, 1][rank], lambda: float(rank)) == pytest.approx(2 / 3)


def test_three_processes_agree(tmp_path: Path) -> None:
    """Sums in their order, weights bit for bit, groups that a process did not see, one error for all."""
    codes = forked.run_several(SIZE, tmp_path / "store", _work)
    assert codes == [0] * SIZE, "".join((tmp_path / f"store.{rank}").read_text() for rank in range(SIZE))


def test_the_dearest_sites_are_dealt_first() -> None:
    """Each to the process with the least work."""
    assert _dealt([1, 8, 3, 3, 3], 2) == [0, 0, 1, 1, 1]
    assert _dealt([5, 5, 5], 4) == [0, 1, 2]
    assert _dealt([], 2) == []


def test_one_process_is_not_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone nothing is exchanged; --num-gpus starts processes where there are none, and only there."""
    assert together(lambda: 3) == [3]
    assert wanted(2) and not wanted(1) and not wanted(None)
    check_count(2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not wanted(4)
    check_count(4)
    with pytest.raises(ConfigError, match="got --num-gpus 2 in one of 4"):
        check_count(2)


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [
        ([(0, 0), (1, 0)], 0, None),
        ([(1, 2), (0, 2)], 2, None),  # the first has said it
        ([(0, 1), (1, 1)], 1, None),
        ([(1, -9), (0, LOST_EXIT_CODE)], 1, "process 1 of 2 was killed (SIGKILL)"),
        ([(0, -9)], 1, "process 0 of 2 was killed (SIGKILL)"),
        ([(1, 3), (0, LOST_EXIT_CODE)], 3, "process 1 of 2 ended with exit code 3"),
        ([(0, LOST_EXIT_CODE), (1, LOST_EXIT_CODE)], 1, None),
    ],
)
def test_what_a_launcher_says(ended: list[tuple[int, int]], code: int, said: str | None) -> None:
    """Which one died, where the first process could not say it."""
    found, message = _verdict(ended, 2)
    assert found == code
    assert message is None if said is None else message is not None and message.startswith(said) and "--resume" in message


def test_a_lost_process_is_an_error_of_ours() -> None:
    """Exit code 1."""
    assert ProcessLost("x").exit_code == 1 and not ProcessLost("x").told
