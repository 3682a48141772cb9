"""The graph passes, one file each, and the one visible order in which they run."""

from __future__ import annotations

from cachepass.ir.boundary import Signal, Site
from cachepass.pass_manager import Pass
from cachepass.passes.batch_experts import BatchExperts as BatchExperts
from cachepass.passes.eliminate_dead_cache import (
    EliminateDeadCache as EliminateDeadCache,
)
from cachepass.passes.fold_sizes import FoldSizes as FoldSizes
from cachepass.passes.insert_block_cache import InsertBlockCache as InsertBlockCache
from cachepass.passes.insert_cfg_cache import InsertCfgCache as InsertCfgCache
from cachepass.passes.insert_signals import InsertSignals as InsertSignals
from cachepass.passes.insert_step_cache import InsertStepCache as InsertStepCache
from cachepass.passes.insert_sublayer_cache import (
    InsertSublayerCache as InsertSublayerCache,
)
from cachepass.passes.mark_boundaries import MarkBoundaries as MarkBoundaries
from cachepass.passes.mark_rows import MarkRows as MarkRows
from cachepass.passes.outline_blocks import OutlineBlocks as OutlineBlocks
from cachepass.passes.outline_regions import OutlineRegions as OutlineRegions


def default_pipeline(sites: tuple[Site, ...], signals: tuple[Signal, ...]) -> tuple[Pass, ...]:
    """The passes for a policy that declares these sites and signals, in order."""
    return (
        # Before anything is told by what it computes: an expert's rows move between blocks' nodes.
        BatchExperts(),
        # Whatever follows looks at shapes.
        FoldSizes(),
        MarkBoundaries(),
        # Slots and conditionals are told how they carry rows as they are made.
        MarkRows(),
        # Signals and sublayers lie inside blocks: before the blocks become single calls.
        InsertSignals(sites, signals),
        InsertSublayerCache(sites),
        OutlineBlocks(sites),
        # From the inside out, so that a later site may hold an earlier one.
        InsertBlockCache(sites, signals),
        InsertStepCache(sites, signals),
        InsertCfgCache(sites, signals),
        # After all readers and writers are in place.
        EliminateDeadCache(),
        # Last: whatever still computes becomes a region.
        OutlineRegions(),
    )
