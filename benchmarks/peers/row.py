"""A row of the table: a title and the problems that stand for it."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.peers.problem import Problem

Question = Literal["matrix", "pickle", "weights", "as found", "reduction"]


@dataclass(frozen=True)
class Row:
    """One layer, loss or feature.

    Attributes:
        name: Short identifier.
        title: For the table, in Markdown.
        problems: What is measured; problems of one row are told apart by their labels.
        question: What is asked: whether the matrix is right, or one of

            * ``pickle``: whether the state can be saved and read without pickle,
            * ``weights``: whether loading a state leaves the model's weights alone,
            * ``as found``: whether estimating leaves the model as it was,
            * ``reduction``: whether a loss with reduction ``none`` is refused by name.
    """

    name: str
    title: str
    problems: tuple[Problem, ...]
    question: Question = "matrix"


@dataclass(frozen=True)
class Section:
    """Rows under a heading."""

    title: str
    rows: tuple[Row, ...]
