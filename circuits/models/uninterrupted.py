"""Changes to a model that Ctrl-C cannot leave half made or half undone.

1. While any change is in force, a handler of ours stands before the one that SIGINT had.
2. It looks at what it interrupts. Inside the entering or leaving of a change that is not done it only takes note;
   anywhere else, above all in the body of the ``with`` block, it passes the interrupt on at once.
3. A noted interrupt is passed on when the outermost entering or leaving is over: after leaving, everything is as it
   was; after entering, the change is undone first if the interrupt raises. Right before it looks for one, last of all,
   an entering or leaving is marked as done, so that none can come too late to be seen.
4. When the last change is undone, SIGINT has its old handler again.

Masking the signal would not do: another thread may receive it, and Python raises in the main thread all the same.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

Given = TypeVar("Given")
Arguments = ParamSpec("Arguments")


class _Interrupts:
    """The changes in force, the handler that SIGINT had before them, and whether an interrupt is noted."""

    changes = 0
    before: Callable[[int, FrameType | None], Any]
    noted = False


class _Change(AbstractContextManager[Given], Generic[Given]):
    def __init__(self, inner: AbstractContextManager[Given]) -> None:
        self._inner = inner
        self._held = False
        # read by the handler: whether entering and leaving are done
        self.entered = self.left = False

    def __enter__(self) -> Given:
        self._held = _hold()
        try:
            given = self._inner.__enter__()
        except BaseException:
            self._release()
            raise
        try:
            self.entered = True
            if self._held:
                _pass_on()
            return given
        except BaseException as error:
            self.entered = False
            try:
                self._inner.__exit__(type(error), error, error.__traceback__)
            finally:
                self._release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, traceback)
        finally:
            self._release()

    def _release(self) -> None:
        if self._held:
            _Interrupts.changes -= 1
            if not _Interrupts.changes and signal.getsignal(signal.SIGINT) is _note:
                signal.signal(signal.SIGINT, _Interrupts.before)
        self.entered = self.left = True
        if self._held:
            _pass_on()


#: What may not be interrupted, until its change says that it is done.
_CRITICAL = {_Change.__enter__.__code__: "entered", _Change.__exit__.__code__: "left"}


def _hold() -> bool:
    """Put our handler first; interrupts reach the main thread alone, and a handler that is not Python's stays."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if not _Interrupts.changes:
        before = signal.getsignal(signal.SIGINT)
        if not callable(before):
            return False
        _Interrupts.before, _Interrupts.noted = before, False
        signal.signal(signal.SIGINT, _note)
    _Interrupts.changes += 1
    return True


def _note(number: int, frame: FrameType | None) -> None:
    if _critical(frame):
        _Interrupts.noted = True
    else:
        _Interrupts.before(number, frame)


def _pass_on() -> None:
    """Pass a noted interrupt on, unless a change around this one is being entered or left."""
    frame = sys._getframe()
    if _Interrupts.noted and not _critical(frame):
        _Interrupts.noted = False
        _Interrupts.before(signal.SIGINT, frame)


def _critical(frame: FrameType | None) -> bool:
    while frame is not None:
        done = _CRITICAL.get(frame.f_code)
        if done is not None and not getattr(frame.f_locals["self"], done):
            return True
        frame = frame.f_back
    return False


def uninterrupted(
    function: Callable[Arguments, Iterator[Given]],
) -> Callable[Arguments, AbstractContextManager[Given]]:
    """`contextlib.contextmanager` for changes to a model: an interrupt never strikes between two states.

    What runs before the ``yield`` and after it runs to its end; an interrupt that comes meanwhile is raised then. The
    body of the ``with`` block can be interrupted as ever.

    Args:
        function: a generator function that changes a model, yields once, and undoes the change in ``finally``.

    Example:
        >>> state = []
        >>> @uninterrupted
        ... def changed():
        ...     try:
        ...         state.append("changed")
        ...         yield len(state)
        ...     finally:
        ...         state.clear()
        >>> with changed() as count:
        ...     print(count, state)
        1 ['changed']
        >>> state
        []
    """
    managed = contextmanager(function)

    @wraps(function)
    def change(*args: Arguments.args, **options: Arguments.kwargs) -> AbstractContextManager[Given]:
        return _Change(managed(*args, **options))

    return change
