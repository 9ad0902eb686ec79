"""Keyword arguments that a function hands on: shown in its signature, and checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def forwards_keywords(
    *targets: Callable[..., Any], without: Collection[str] = ()
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Say what the `**keywords` of a function are: those of the functions that it hands them to.

    `inspect.signature` and `help` then show them, with their defaults; others are refused by name.

    Args:
        *targets: The functions or classes that get the keywords.
        without: Arguments of theirs that the function fills in by itself.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        own = inspect.signature(function)
        parameters = {
            name: parameter
            for name, parameter in own.parameters.items()
            if parameter.kind is not Parameter.VAR_KEYWORD
        }
        for target in targets:
            for name, parameter in inspect.signature(target).parameters.items():
                by_name = parameter.kind in (
                    Parameter.POSITIONAL_OR_KEYWORD,
                    Parameter.KEYWORD_ONLY,
                )
                if by_name and name not in without:
                    parameters.setdefault(name, parameter.replace(kind=Parameter.KEYWORD_ONLY))

        known = [name for name in parameters if name != "self"]

        @wraps(function)
        def checked(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
            check_keywords(function, keywords, known)
            return function(*args, **keywords)

        signature = own.replace(parameters=list(parameters.values()))
        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked

    return decorate


def check_keywords(
    function: Callable[..., Any], given: Iterable[str], known: Collection[str]
) -> None:
    """Raise `TypeError` for a keyword argument that is not known, saying which ones are.

    Args:
        function: What is called; a constructor goes by the name of its class.
        given: The names of the keyword arguments.
        known: The names of all arguments that there are.
    """
    for name in given:
        if name not in known:
            called = function.__qualname__.removesuffix(".__init__")
            close = get_close_matches(name, known, n=1)
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            raise TypeError(
                f"{called} has no argument {name!r}{guess}; expected one of {', '.join(known)}"
            )
