"""cachepass: caching in diffusion transformers, as a compiler pass."""

from __future__ import annotations

# Compile, and look inside.
from cachepass.api import (
    compile as compile,
    dump as dump,
    report as report,
    reset as reset,
    restore as restore,
    rows as rows,
    session as session,
)
from cachepass.calibrate import calibrate as calibrate
from cachepass.compiled import CachedModule as CachedModule
from cachepass.errors import (
    CachePassError as CachePassError,
    CaptureError as CaptureError,
    PassError as PassError,
    PolicyError as PolicyError,
    SessionError as SessionError,
    VerifyError as VerifyError,
)
from cachepass.explain import Explanation as Explanation, explain as explain
from cachepass.export import (
    export as export,
    export_aoti as export_aoti,
    export_onnx as export_onnx,
)

# Where: sites; and what can be measured.
from cachepass.ir.boundary import (
    Against as Against,
    BlockChange as BlockChange,
    Blocks as Blocks,
    CacheChange as CacheChange,
    Cfg as Cfg,
    Kind as Kind,
    LatentChange as LatentChange,
    OutputChange as OutputChange,
    Signal as Signal,
    Site as Site,
    SublayerChange as SublayerChange,
    Sublayers as Sublayers,
    TimestepChange as TimestepChange,
    WholeCall as WholeCall,
)

# What instead: predictors.
from cachepass.ir.predictors import (
    LAST as LAST,
    RESIDUAL as RESIDUAL,
    Extrapolate as Extrapolate,
    FrequencySplit as FrequencySplit,
    Moment as Moment,
    Predictor as Predictor,
    Reuse as Reuse,
    Taylor as Taylor,
    TwoAnchor as TwoAnchor,
)
from cachepass.plan import plan as plan
from cachepass.runtime.plan import Plan as Plan, SlotPlan as SlotPlan

# Combinations that have a name.
from cachepass.runtime.policies import (
    PAB as PAB,
    AdaCache as AdaCache,
    Compute as Compute,
    DBCache as DBCache,
    DiCache as DiCache,
    EasyCache as EasyCache,
    FasterCache as FasterCache,
    FirstBlock as FirstBlock,
    MagCache as MagCache,
    MixCache as MixCache,
    Profile as Profile,
    Schedule as Schedule,
    SRDiffusion as SRDiffusion,
    TaylorSeer as TaylorSeer,
    TeaCache as TeaCache,
    policies as policies,
)
from cachepass.runtime.policy import (
    COMPUTE as COMPUTE,
    Config as Config,
    Decision as Decision,
    Facts as Facts,
    Measure as Measure,
    NamedPolicy as NamedPolicy,
    Policy as Policy,
    Trigger as Trigger,
)
from cachepass.runtime.session import Session as Session

# When: triggers.
from cachepass.runtime.triggers import (
    Accumulated as Accumulated,
    AtSteps as AtSteps,
    Below as Below,
    Cheapest as Cheapest,
    Codebook as Codebook,
    Estimate as Estimate,
    Limited as Limited,
    MagnitudeRatio as MagnitudeRatio,
    Motion as Motion,
    Never as Never,
    Periodic as Periodic,
    PerSite as PerSite,
    Relative as Relative,
    TransformRate as TransformRate,
    Windowed as Windowed,
)

__version__ = "0.1.0"
