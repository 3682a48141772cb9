"""cachepass: caching in diffusion transformers, as a compiler pass."""

from __future__ import annotations

from cachepass.api import (
    CachedModule as CachedModule,
    compile as compile,
    dump as dump,
    report as report,
    reset as reset,
    restore as restore,
    session as session,
)
from cachepass.errors import (
    CachePassError as CachePassError,
    CaptureError as CaptureError,
    PassError as PassError,
    PolicyError as PolicyError,
    SessionError as SessionError,
    VerifyError as VerifyError,
)
from cachepass.runtime.policies import (
    AdaCache as AdaCache,
    Compute as Compute,
    FirstBlock as FirstBlock,
    MixCache as MixCache,
    Schedule as Schedule,
    TeaCache as TeaCache,
    policies as policies,
)
from cachepass.runtime.policy import Policy as Policy
from cachepass.runtime.session import Session as Session

__version__ = "0.1.0"
