"""Rows of several requests in one call: continuous batching."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Sequence
from types import TracebackType

from cachepass.errors import SessionError
from cachepass.runtime.session import Location, Session


class Rows:
    """Says whose each row of the calls inside is. Made by `cachepass.rows`."""

    def __init__(self, owner: object, rows: Sequence[Session | Location]) -> None:
        self.owner = owner
        self._listed = [Location(row) if isinstance(row, Session) else row for row in rows]
        self._entered: contextlib.ExitStack | None = None
        self._places: list[Location] = []
        if not rows:
            raise SessionError("`rows` is empty: a call has at least one row")
        seen: set[tuple[Session, str | None, int]] = set()
        for i, row in enumerate(self._listed):
            if row.session.owner is not owner:
                raise SessionError(
                    f"`rows`[{i}] is a session of another model: make it with "
                    "cachepass.session(model)"
                )
            key = (row.session, row.branch, row.sample)
            if key in seen:
                raise SessionError(
                    f"`rows`[{i}] is there twice: one session, branch {row.branch!r} and sample "
                    f"{row.sample}. Name further rows of a request with session.row(sample=...) or "
                    "session.row(branch=...)"
                )
            seen.add(key)

    def __enter__(self) -> Rows:
        if self._entered is not None:
            raise SessionError(
                "these `rows` are entered already: call cachepass.rows again for another `with`"
            )
        with contextlib.ExitStack() as entered:
            for session in dict.fromkeys(row.session for row in self._listed):
                entered.enter_context(session)
            self._entered = entered.pop_all()
        self._places = [
            row if row.step is not None else dataclasses.replace(row, step=row.session.upcoming)
            for row in self._listed
        ]
        ROWS.set((*ROWS.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ROWS.set(tuple(other for other in ROWS.get() if other is not self))
        assert self._entered is not None
        entered, self._entered = self._entered, None
        entered.close()

    def places(self, count: int, branch: str | None) -> list[Location]:
        """Whose the rows of a call are.

        Args:
            count: rows of the call.
            branch: of rows that name none; by the order of a step's calls if None.
        """
        if count != len(self._places):
            raise SessionError(
                f"the call has {count} rows, and cachepass.rows lists {len(self._places)}: each "
                "row belongs to a session"
            )
        found = [
            row if row.branch is not None
            else dataclasses.replace(row, branch=branch or row.session.branch_by_order(row.step))
            for row in self._places
        ]  # fmt: skip
        for i, row in enumerate(found):
            if row in found[:i]:
                raise SessionError(
                    f"`rows`[{i}] is there twice: one session, branch {row.branch!r} and sample "
                    f"{row.sample}"
                )
        return found


ROWS: contextvars.ContextVar[tuple[Rows, ...]] = contextvars.ContextVar(
    "cachepass_rows", default=()
)
