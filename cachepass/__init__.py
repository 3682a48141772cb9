"""cachepass: caching in diffusion transformers, as a compiler pass."""

from __future__ import annotations

from cachepass.api import CachedModule as CachedModule
from cachepass.api import compile as compile  # noqa: A004
from cachepass.api import dump as dump
from cachepass.api import report as report
from cachepass.api import reset as reset
from cachepass.api import restore as restore
from cachepass.api import session as session
from cachepass.errors import CachePassError as CachePassError
from cachepass.errors import CaptureError as CaptureError
from cachepass.errors import PassError as PassError
from cachepass.errors import PolicyError as PolicyError
from cachepass.errors import SessionError as SessionError
from cachepass.errors import VerifyError as VerifyError
from cachepass.runtime.policies import AdaCache as AdaCache
from cachepass.runtime.policies import Compute as Compute
from cachepass.runtime.policies import FirstBlock as FirstBlock
from cachepass.runtime.policies import MixCache as MixCache
from cachepass.runtime.policies import Schedule as Schedule
from cachepass.runtime.policies import TeaCache as TeaCache
from cachepass.runtime.policies import policies as policies
from cachepass.runtime.policy import Policy as Policy
from cachepass.runtime.session import Session as Session

__version__ = "0.1.0"
