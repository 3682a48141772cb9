"""Two processes on one request decide alike, and as one process does."""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.multiprocessing as mp
from filelock import FileLock

import cachepass
from cachepass.errors import CachePassError

pytest.importorskip("diffusers")

from tests import ranks
from tests.models import distance
from tests.ranks import BRANCHES, SCENARIOS, SPOILED, STEPS, TINY, Result

Found = dict[str, tuple[Result, Result]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What both ranks did in each scenario; the processes are started once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            mp.spawn(ranks.work, (str(folder),), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]  # torch gives it no types
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    return {name: (first[name], second[name]) for name in SCENARIOS}


@functools.cache
def one_process(name: str, branches: tuple[str, ...] = BRANCHES) -> Result:
    """The request of a scenario as one process serves it."""
    return ranks.run(ranks.compiled(SCENARIOS[name][1]), branches)


def reused(result: Result, branch: str) -> list[bool]:
    """Of each step, whether it reused something."""
    return [bool(result["decisions"][step, branch][0]) for step in range(STEPS)]


def assert_as_one(result: Result, one: Result, branches: tuple[str, ...]) -> None:
    for step, branch in one["decisions"]:
        if branch in branches:
            assert result["decisions"][step, branch] == one["decisions"][step, branch]
            got, want = (r["outputs"][step, branch] for r in (result, one))
            assert distance(got, want) <= 1e-5
    assert set(reused(one, branches[0])) == {False, True}, "the case decides nothing"


TOKENS = ["tokens, mlp", "tokens, mixcache", "tokens, dicache", "ring, firstblock"]


@pytest.mark.parametrize("name", TOKENS)
def test_ranks_that_split_tokens_decide_as_one_process(found: Found, name: str) -> None:
    for result in found[name]:
        assert_as_one(result, one_process(name), BRANCHES)
        assert result["stacks"] == {"blocks": TINY.blocks}


def test_without_a_group_split_tokens_decide_otherwise(found: Found) -> None:
    """The cases above tell the halves of the tokens apart."""
    name = "tokens, mlp, each for itself"
    first, second = (reused(result, "cond") for result in found[name])
    assert first != second
    assert reused(one_process(name), "cond") not in (first, second)


@pytest.mark.parametrize("name", ["guidance, adacache", "guidance, easycache"])
def test_ranks_that_split_guidance_decide_as_one_process(found: Found, name: str) -> None:
    for branch, result in zip(BRANCHES, found[name], strict=True):
        assert_as_one(result, one_process(name), (branch,))


def test_without_a_group_split_guidance_decides_otherwise(found: Found) -> None:
    name = "guidance, adacache"
    alone = one_process(name, ("cond",))
    assert reused(alone, "cond") != reused(found[name][0], "cond")


def test_a_policy_of_branches_decides_on_both(found: Found) -> None:
    name = "guidance, firstblock"
    first, second = (reused(r, b) for r, b in zip(found[name], BRANCHES, strict=True))
    assert first == second
    assert set(first) == {False, True}
    one = one_process(name)
    assert reused(one, "cond") != reused(one, "uncond")


@pytest.mark.parametrize(
    ("name", "rank", "note"),
    [
        ("cold", 0, "another rank has lost its caches: caches dropped"),
        ("spoiled", 1, "signal 'probe' was NaN, infinite or zero: no evidence for reuse"),
    ],
)
def test_what_fails_on_one_rank_is_computed_on_all(
    found: Found, name: str, rank: int, note: str
) -> None:
    first, second = (reused(r, b) for r, b in zip(found[name], BRANCHES, strict=True))
    assert first == second
    usual = reused(found["guidance, firstblock"][0], "cond")
    assert usual[SPOILED]
    assert not first[SPOILED]
    assert first[:SPOILED] == usual[:SPOILED]
    assert any(first[SPOILED:])
    assert note in found[name][rank]["notes"]


def test_after_a_loss_no_rank_stands_on_what_it_kept(found: Found) -> None:
    """What a rank of older steps still held would enter the first prediction afterwards."""
    kept = found["cold"][0]["kept"]
    assert kept[SPOILED] == {SPOILED}
    assert len(found["guidance, firstblock"][0]["kept"][SPOILED - 1]) > 1


def test_one_exchange_for_each_decision(found: Found) -> None:
    """Of all signals together; of calls whose branches decide together, at the first of a step."""
    calls = STEPS * len(BRANCHES)
    assert [r["exchanges"] for r in found["tokens, mlp"]] == [calls, calls]
    assert [r["exchanges"] for r in found["tokens, mixcache"]] == [STEPS, STEPS]
    assert [r["exchanges"] for r in found["guidance, firstblock"]] == [STEPS, STEPS]
    # Step, branch, whether fresh, a site; of the signal six numbers; eight bytes each.
    assert found["guidance, firstblock"][0]["bytes"] == STEPS * (3 + 1 + 6) * 8
    assert "decided alike by 2 ranks: " in found["guidance, firstblock"][0]["report"]


def test_nothing_measured_nothing_exchanged(found: Found) -> None:
    for branch, result in zip(BRANCHES, found["taylorseer"], strict=True):
        assert result["exchanges"] == result["bytes"] == 0
        assert_as_one(result, one_process("taylorseer"), (branch,))


ERRORS = {
    "out of step": "SessionError: the ranks of `group` are at steps 0, 1: they decide together, so "
    "each makes the same calls in the same order",
    "cfg": "PolicyError: policy 'schedule': site 'cfg' has nothing to skip: the model is called "
    "once per step, so guidance is distilled or off, or another process makes the other branch's "
    "call",
    "graph": "CachePassError: `group` is an option of lowering='regions': a whole graph decides on "
    "its own",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_on_both_ranks(found: Found, name: str) -> None:
    for result in found[name]:
        assert result["error"].startswith(ERRORS[name])


def test_a_group_is_a_process_group() -> None:
    with pytest.raises(CachePassError, match=r"`group`=2: must be a torch\.distributed\.Process"):
        cachepass.compile(TINY.model(), policy="firstblock", group=2)  # type: ignore[arg-type]
