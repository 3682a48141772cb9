from __future__ import annotations

import warnings

import pytest

import cachepass
from tests.models import TOY
from tests.requests import notes


def test_a_request_that_reused_nothing_warns_once() -> None:
    cached = cachepass.compile(
        TOY.model(), policy=cachepass.FirstBlock(threshold=0.0, warmup_steps=9), inner="eager"
    )

    def request() -> cachepass.Session:
        session = cachepass.session(cached, num_inference_steps=3)
        for step in range(3):
            with session.at(step=step):
                cached(**TOY.example())
        return session

    with pytest.warns(UserWarning, match="policy 'firstblock' reused nothing in a request of 3"):
        session = request()
    assert "nothing was reused" in notes(session)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request()


def test_compute_never_warns() -> None:
    cached = cachepass.compile(TOY.model(), policy="compute", inner="eager")
    session = cachepass.session(cached, num_inference_steps=1)
    with session.at(step=0):
        cached(**TOY.example())
