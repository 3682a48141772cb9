"""Every error that cachepass raises on purpose. A leaf module."""

from __future__ import annotations


class CachePassError(Exception):
    """Base class of all errors raised by cachepass."""


class CaptureError(CachePassError):
    """The denoising call cannot be captured as one graph, or holds no site."""


class PassError(CachePassError):
    """A pass raised, or returned something that is not a legal graph."""


class VerifyError(CachePassError):
    """A graph breaks a rule of the IR; names the rule and the node."""


class PolicyError(CachePassError, ValueError):
    """A policy, or one of its options, is unknown or out of its range."""


class SessionError(CachePassError):
    """A session is used in a way that would mix requests."""
