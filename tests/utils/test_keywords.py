"""Keyword arguments that are handed on: what `inspect` sees of them, and what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from rotate_ewc._utils.keywords import check_keywords, forwards_keywords


def target(first: int, second: int = 2, *, third: int = 3, fourth: int = 4) -> int:
    return first + second + third + fourth


@forwards_keywords(target, without=("first",))
def outer(own: int, *, third: int = 30, **keywords: Any) -> int:
    """Add ten."""
    return target(own, third=third, **keywords) + 10


class Base:
    @forwards_keywords(target)
    def __init__(self, **keywords: Any) -> None:
        self.value = target(**keywords)


class Outer:
    @forwards_keywords(Base, without=("second",))
    def __init__(self, own: str, **keywords: Any) -> None:
        self.own, self.value = own, Base(**keywords).value


def test_signature_shows_the_keywords_of_the_target() -> None:
    parameters = inspect.signature(outer).parameters
    assert list(parameters) == ["own", "third", "second", "fourth"]
    assert [p.default for p in parameters.values()][1:] == [30, 2, 4]
    assert parameters["own"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(parameters[n].kind is inspect.Parameter.KEYWORD_ONLY for n in list(parameters)[1:])
    assert (outer.__name__, outer.__doc__) == ("outer", "Add ten.")


def test_signature_of_a_class_hands_on_that_of_another() -> None:
    assert list(inspect.signature(Base).parameters) == ["first", "second", "third", "fourth"]
    assert list(inspect.signature(Outer).parameters) == ["own", "first", "third", "fourth"]


def test_known_keywords_arrive() -> None:
    assert outer(1) == 1 + 2 + 30 + 4 + 10
    assert outer(1, second=5, third=6, fourth=7) == 1 + 5 + 6 + 7 + 10
    assert Outer("x", first=1, fourth=0).value == 1 + 2 + 3 + 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: outer(1, secnd=1),
            r"^outer has no argument 'secnd' \(did you mean 'second'\?\); expected one of own, "
            r"third, second, fourth$",
        ),
        (lambda: outer(1, first=1), "^outer has no argument 'first'.*; expected one of own"),
        (
            lambda: Outer("x", first=1, zzz=1),
            "^Outer has no argument 'zzz'; expected one of own, first, third, fourth$",
        ),
    ],
)
def test_unknown_keywords_are_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_positional_arguments_are_python_s_own_business() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        outer(1, 2)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'own'"):
        outer()


def test_names_that_resemble_nothing_have_no_suggestion() -> None:
    with pytest.raises(TypeError, match=r"^target has no argument 'q'; expected one of first$"):
        check_keywords(target, ["first", "q"], ["first"])
    check_keywords(target, ["first"], ["first"])
