"""What every pass owes: it fires, or leaves the graph alone; running it again changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings, strategies as st

import cachepass
from cachepass.ir import ops
from cachepass.ir.boundary import (
    BlockChange,
    Blocks,
    CacheChange,
    Cfg,
    Kind,
    LatentChange,
    Signal,
    Site,
    SublayerChange,
    Sublayers,
    TimestepChange,
    WholeCall,
    layout_of,
)
from cachepass.ir.graph import walk
from cachepass.ir.printer import format_graph
from cachepass.ir.verify import verify
from cachepass.pass_manager import Pass, PassResult, run_passes
from cachepass.passes import (
    EliminateDeadCache,
    InsertBlockCache,
    InsertCfgCache,
    InsertSignals,
    InsertStepCache,
    InsertSublayerCache,
    MarkBoundaries,
    OutlineBlocks,
    OutlineRegions,
    default_pipeline,
)
from tests.graphs import Captured, Script, capture
from tests.models import TOY
from tests.toys.dit import ToyDiT

ATTENTION = Sublayers(name="attention", kinds=(Kind.SELF_ATTENTION,))
SITES: dict[str, Site] = {
    "step": WholeCall(),
    "cfg": Cfg(),
    "stack": Blocks(),
    "block": Blocks(name="block", start=1, stop=2),
    "attention": ATTENTION,
}
ALL = tuple(SITES.values())


def _run_up_to(name: str, policy: Script) -> tuple[Captured, Pass, tuple[Pass, ...]]:
    """A graph as the pass of this name finds it, that pass, and those that follow."""
    captured = capture()
    passes = captured.pipeline(policy)
    number = [p.name for p in passes].index(name)
    captured.run(*passes[:number])
    return captured, passes[number], passes[number + 1 :]


FIRES = {
    "mark-boundaries": Script(),
    "insert-signals": Script(places=(Blocks(),), measured=(TimestepChange(),)),
    "insert-sublayer-cache": Script(places=(ATTENTION,)),
    "outline-blocks": Script(),
    "insert-block-cache": Script(places=(Blocks(),)),
    "insert-step-cache": Script(places=(WholeCall(),)),
    "insert-cfg-cache": Script(places=(Cfg(),)),
    "eliminate-dead-cache": Script(places=(Cfg(),), predictor="last"),  # wants no cond output
    "outline-regions": Script(),
}


@pytest.mark.parametrize("name", FIRES)
def test_fires_and_is_idempotent(name: str) -> None:
    policy = FIRES[name]
    captured, current, later = _run_up_to(name, policy)
    gm = captured.gm
    result = run_passes(gm, [current])
    assert result.modified
    assert captured.matches(policy)
    text = format_graph(gm)
    again = current(gm)
    assert not again.modified
    assert again.graph_module is gm
    assert format_graph(gm) == text
    captured.run(*later)
    assert captured.matches(policy)


IDLE = {
    "insert-signals": Script(),
    "insert-sublayer-cache": Script(places=(Blocks(),)),
    "insert-block-cache": Script(places=(Cfg(),)),
    "insert-step-cache": Script(places=(Blocks(),)),
    "insert-cfg-cache": Script(places=(Blocks(),)),
    "eliminate-dead-cache": Script(places=(WholeCall(),)),
}


@pytest.mark.parametrize("name", IDLE)
def test_leaves_alone_what_is_not_its_own(name: str) -> None:
    captured, current, _ = _run_up_to(name, IDLE[name])
    gm = captured.gm
    text = format_graph(gm)
    result = current(gm)
    assert not result.modified
    assert result.graph_module is gm
    assert format_graph(gm) == text


def test_outlining_twice_finds_nothing() -> None:
    captured = capture()
    gm = captured.run(*captured.pipeline(Script(places=ALL)))
    for current in (OutlineBlocks(()), OutlineRegions(), EliminateDeadCache()):
        assert not current(gm).modified


# ------------------------------------------------------------------------------- texts


def test_equal_runs_of_two_blocks_share_one_region() -> None:
    captured = capture(dataclasses.replace(TOY, build=lambda: ToyDiT(depth=5), blocks=5))
    gm = captured.run(*captured.pipeline(cachepass.Compute()))
    assert captured.matches()
    text = format_graph(gm)
    assert "region layers  # 2 calls" in text
    assert "region layers_1  # 1 calls" in text
    assert [n.target for n in gm.graph.find_nodes(op="call_module")] == [
        "prologue", "layers", "layers", "layers_1", "epilogue",
    ]  # fmt: skip


def test_a_region_ends_where_a_site_does() -> None:
    captured = capture(dataclasses.replace(TOY, build=lambda: ToyDiT(depth=6), blocks=6))
    policy = Script(places=(Blocks(name="middle", start=1, stop=4), Blocks(name="tail", start=1)))
    text = format_graph(captured.run(*captured.pipeline(policy)))
    assert captured.matches(policy)
    assert "region layers  # 2 calls" in text, "blocks 0 and 3 alone"
    assert "region layers_1  # 2 calls" in text, "blocks 1 to 2 and 4 to 5"


def test_the_text_of_a_block_cache() -> None:
    policy = cachepass.FirstBlock(site=Blocks(name="tail", start=1), predictor=None)
    captured = capture()
    gm = captured.run(*captured.pipeline(policy))
    assert captured.matches(policy)
    body = [line.partition(" = ")[2] or line.strip() for line in format_graph(gm).splitlines()]
    flow = [line.partition("(")[0] for line in body]
    assert flow.count("decide") == 1
    decide, cond = (
        flow.index("decide"),
        body.index(next(line for line in body if line.startswith("if not reused 'tail'"))),
    )
    assert flow[:decide].count("layers") == 1, "one block runs before the decision"
    assert decide < cond
    inside = body[cond : body.index("else:")]
    assert sum(line.startswith("layers_1(") for line in inside) == 1, "the other two, in one"
    assert any(line.startswith("cache_write('tail.residual'") for line in inside)
    assert "slots:" in body
    assert "tail.residual  # of site 'tail'" in body
    assert "probe  # reference of a signal" in body


def test_printing_is_deterministic() -> None:
    texts = set()
    for _ in range(2):
        captured = capture()
        gm = captured.run(*captured.pipeline(cachepass.MixCache()))
        texts |= {format_graph(gm), format_graph(gm)}
    assert len(texts) == 1


# --------------------------------------------------------------------- each on its own


@pytest.mark.parametrize(
    ("signal", "slot"),
    [
        (LatentChange(), "latent"),
        (TimestepChange(), "timestep"),
        (BlockChange(), "probe"),
        (SublayerChange(), "sublayer"),
    ],
)
def test_a_signal_has_a_slot_of_its_own(signal: Signal, slot: str) -> None:
    policy = Script(places=(Blocks(name="tail", start=1),), measured=(signal,))
    captured = capture()
    gm = captured.run(MarkBoundaries(), InsertSignals(policy.places, policy.measured))
    assert layout_of(gm).slots[slot].site is None
    assert layout_of(gm).slots[slot].across_branches == (slot == "latent")
    observed = [n.args[1] for p in walk(gm) for n in p.graph.nodes if n.target is ops.observe]
    assert observed == [slot]
    captured.run(*captured.pipeline(policy)[2:])
    assert captured.matches(policy)


def test_dead_slots_go_with_the_work_that_fills_them() -> None:
    captured = capture()
    gm = captured.run(MarkBoundaries(), InsertSignals((Blocks(),), (TimestepChange(),)))
    for part in walk(gm):
        for node in list(part.graph.find_nodes(op="call_function", target=ops.observe)):
            sums = node.args[3]
            part.graph.erase_node(node)
            part.graph.erase_node(sums)
    result = run_passes(gm, [EliminateDeadCache()])
    assert result.modified
    assert layout_of(gm).slots == {}
    targets = {n.target for part in walk(gm) for n in part.graph.nodes}
    assert not targets & {ops.cache_read, ops.cache_write, ops.clone}
    assert captured.matches()


def test_nested_ranges_are_inserted_inside_out() -> None:
    captured = capture()
    policy = Script(places=(Blocks(), Blocks(name="inner", start=1, stop=2)))
    gm = captured.run(*captured.pipeline(policy))
    (cond,) = gm.graph.find_nodes(op="call_function", target=ops.conditional)
    arm = getattr(gm, str(cond.args[2].target))
    (inner,) = arm.graph.find_nodes(op="call_function", target=ops.conditional)
    assert (cond.args[1], inner.args[1]) == ("stack", "inner")
    assert layout_of(gm).coverage["inner"] == {1}
    assert captured.matches(policy)


# --------------------------------------------------------------------- what is refused


def _failing(policy: Script) -> None:
    captured = capture()
    captured.run(*captured.pipeline(policy))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Script(places=(Blocks(name="far", start=2, stop=9),)),
            r"site 'far' asks for blocks \[2:9\], .*3 blocks is \[2:9\]",
        ),
        (
            Script(places=(Blocks(name="a", stop=2), Blocks(name="b", start=1))),
            r"sites '.' \[.:.\] and '.' \[.:.\] overlap",
        ),
        (
            Script(places=(Blocks(),), measured=(BlockChange(),)),
            r"site 'stack' starts at block 0, before the policy has measured",
        ),
        (
            Script(places=(ATTENTION, Cfg()), measured=(CacheChange(name="a", site="attention"),)),
            r"signal 'a' measures what site 'attention' caches: .* keep one value \(cfg\)",
        ),
        (
            Script(places=(Sublayers(name="x", kinds=(Kind.CROSS_ATTENTION,)),)),
            r"site 'x' asks for sublayers of kind cross-attention; this model offers mlp, self",
        ),
        (
            Script(places=(Blocks(),), measured=(SublayerChange(kind=Kind.CROSS_ATTENTION),)),
            r"measures the cross-attention of block 1, which was not found; .*mlp, self-attention",
        ),
        (
            Script(places=(Blocks(name="t", start=1),), measured=(BlockChange(blocks=8),)),
            r"looks at block 7 of a model with 3 blocks: the last one is 2",
        ),
    ],
)
def test_what_a_policy_may_not_ask_for(policy: Script, message: str) -> None:
    with pytest.raises(cachepass.PolicyError, match=message):
        _failing(policy)


@pytest.mark.parametrize(
    "current",
    [
        InsertSignals((Blocks(),), ()),
        InsertSublayerCache((ATTENTION,)),
        InsertBlockCache((Blocks(),), ()),
        InsertStepCache((WholeCall(),), ()),
        InsertCfgCache((Cfg(),), ()),
        EliminateDeadCache(),
    ],
    ids=lambda p: p.name,
)
def test_a_graph_that_was_not_marked(current: Pass) -> None:
    with pytest.raises(cachepass.PassError, match=f"{current.name}.*run MarkBoundaries first"):
        run_passes(capture().gm, [current])


def test_the_manager_names_the_pass_that_fails() -> None:
    class Bad:
        name = "be-bad"

        def __call__(self, gm: object) -> PassResult:
            return None  # type: ignore[return-value]

    with pytest.raises(
        cachepass.PassError,
        match=r"'be-bad' failed \(passes run before it: mark-boundaries\): expected a PassResult",
    ):
        run_passes(capture().gm, [MarkBoundaries(), Bad()])


# -------------------------------------------------------------------------- properties


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    names=st.sets(st.sampled_from(sorted(SITES))),
    measured=st.sets(st.sampled_from(["latent", "cache"])),
    left_out=st.sets(
        st.sampled_from(["eliminate-dead-cache", "outline-blocks", "outline-regions"])
    ),
)
def test_subsets_of_the_pipeline_verify(
    names: set[str], measured: set[str], left_out: set[str]
) -> None:
    sites = tuple(site for name, site in SITES.items() if name in names)
    signals: list[Signal] = [LatentChange()] if "latent" in measured else []
    if "cache" in measured:
        signals += [CacheChange(name=s.name, site=s.name) for s in sites if s != ATTENTION]
    captured = capture()
    passes = [p for p in default_pipeline(sites, tuple(signals)) if p.name not in left_out]
    gm = captured.run(*passes)
    verify(gm)
    assert captured.matches(Script(places=sites, measured=tuple(signals)))
