"""Which step and branch a call is, where nothing but the calls tells."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Clock:
    """Steps and branches read off the calls alone, where nothing better is known.

    A timestep that differs from the one before starts a step; one that turns back starts a
    request. Within a step, calls with other conditioning are other branches, named by their
    order; the same conditioning again at the same timestep is a further step (Heun).
    """

    def __init__(self) -> None:
        self.step = -1
        self._time: float | None = None
        self._direction = 0.0
        self._seen: list[object] = []

    def tick(self, time: float, conditioning: object) -> tuple[int, str, bool]:
        """(step, branch, whether a new request started) of a call.

        `conditioning` is kept until the timestep changes and compared by ``==``.
        """
        restarted = False
        if self._time is None or time != self._time:
            move = 0.0 if self._time is None else time - self._time
            if self._direction and move * self._direction < 0:
                self.__init__()  # type: ignore[misc]
                restarted = True
            elif move:
                self._direction = move
            self.step, self._time, self._seen = self.step + 1, time, []
        elif conditioning in self._seen:
            self.step, self._seen = self.step + 1, []
        self._seen.append(conditioning)
        return self.step, f"call{len(self._seen) - 1}", restarted


class Conditioning:
    """The tensors that tell the branches of a step apart, equal if they are the same memory.

    Holds them: an address that is free again could belong to another branch's.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tuple(tensors)
        self._key = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conditioning) and self._key == other._key

    __hash__ = None  # type: ignore[assignment]
