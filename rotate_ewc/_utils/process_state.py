"""Settings that are shared by all of a process: changed for a while, then as they were found.

Who changes one and puts it back is not alone. Estimations run inside each other, and beside each
other in threads, where the first to come may be the first to leave.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

AS_FOUND: Final = object()


@dataclass(frozen=True)
class Setting:
    """Something that everybody can read and write.

    Attributes:
        key: What tells it from others.
        read: Returns its value.
        write: Gives it a value.
        meanwhile: The value it has until it is put back; `AS_FOUND` leaves it alone.
    """

    key: Hashable
    read: Callable[[], Any]
    write: Callable[[Any], None]
    meanwhile: Any = AS_FOUND


@dataclass(eq=False)
class _Visit:
    """A stay with a setting, and the value that is to be put back after it."""

    found: Any = None


# By setting, the visits that have not ended, in the order in which they began.
_VISITS: Final[dict[Hashable, list[_Visit]]] = {}
_LOCK: Final = Lock()


@contextmanager
def kept(settings: Iterable[Setting]) -> Iterator[None]:
    """Change settings, and put them back, whatever happens in between.

    Who comes second finds what the first has made of a setting. So who leaves before a later one
    writes nothing, but hands on what it found: what somebody still needs stays as it is, and when
    all have left it is again what it was before the first came.
    """
    visits: list[tuple[Setting, _Visit]] = []
    try:
        for setting in settings:
            # In this order, so that an interrupt in between leaves nothing that is not put back.
            visits.append((setting, _Visit()))
            _arrive(*visits[-1])
        yield
    finally:
        # An interrupt may come here too; what it left out is done before it goes on.
        try:
            _leave_all(visits)
        except BaseException:
            _leave_all(visits)
            raise


def _leave_all(visits: Sequence[tuple[Setting, _Visit]]) -> None:
    """End visits in reverse, also where one cannot be ended; those that have ended stay so."""
    errors = []
    for setting, visit in reversed(visits):
        try:
            _leave(setting, visit)
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _arrive(setting: Setting, visit: _Visit) -> None:
    with _LOCK:
        visit.found = setting.read()
        _VISITS.setdefault(setting.key, []).append(visit)
        if setting.meanwhile is not AS_FOUND:
            setting.write(setting.meanwhile)


def _leave(setting: Setting, visit: _Visit) -> None:
    try:
        _put_back(setting, visit)
    except BaseException:
        try:
            _put_back(setting, visit)
        finally:
            _forget(setting, visit)
        raise


def _put_back(setting: Setting, visit: _Visit) -> None:
    with _LOCK:
        visits = _VISITS.get(setting.key, [])
        if visit not in visits:
            return
        later = visits[visits.index(visit) + 1 :]
        if later:
            later[0].found = visit.found
        else:
            setting.write(visit.found)
    _forget(setting, visit)


def _forget(setting: Setting, visit: _Visit) -> None:
    with _LOCK:
        visits = _VISITS.get(setting.key, [])
        if visit in visits:
            visits.remove(visit)
        if not visits:
            _VISITS.pop(setting.key, None)
