"""Random programs that move rows about by their data: the package is right, or says that it is not.

Each is judged by a loop over its examples. If the outputs of a batch are not those of its examples
alone, examples depend on each other, and refusing it is right; so it is for a program with
something in it that is known not to be supported.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

from tests.helpers.oracles import output_hessian
from tests.helpers.programs.judge import Verdict, compared, exact, judge, loss_vectors
from tests.helpers.programs.program import Program, draw

# What may be refused though the examples are separate, and the most that this may be, in per cent
# of all programs.
UNSUPPORTED = {
    "embedding bag": 6,
    "parameter in place of data": 6,
    "recurrent layer": 2,
    "rows shared by examples": 5,
}


def failure(program: Program, verdict: Verdict) -> str | None:
    """Return what is wrong with a verdict, if anything is."""
    if verdict.outcome in ("wrong", "crashed"):
        return verdict.outcome
    if verdict.outcome == "refused" and verdict.separate and not program.kinds & {*UNSUPPORTED}:
        return "wrongly refused"
    return None


def report(program: Program, reason: str, message: str) -> str:
    """Say all that it takes to see a failure again."""
    seed = program.seed
    return (
        f"program {seed}: {reason}: {message}\n{program.text}\n"
        f"{program.loss} ({program.loss.reduction}), {program.fisher}, {dict(program.options)}\n"
        f"batches of {program.sizes}; to see it again: "
        f"python -m tests.helpers.programs {seed} {seed + 1}"
    )


def judge_all(seeds: Sequence[int]) -> Iterator[tuple[Program, Verdict]]:
    """Judge programs, one after the other."""
    for seed in seeds:
        program = draw(seed)
        yield program, judge(program)


def check(seeds: Sequence[int]) -> None:
    """Check that none is wrong, crashes, or is refused without need."""
    outcomes, refused, failures = Counter[str](), Counter[str](), []
    for program, verdict in judge_all(seeds):
        outcomes[f"{'separate' if verdict.separate else 'mixing'}, {verdict.outcome}"] += 1
        if verdict.separate and verdict.outcome == "refused":
            refused.update(program.kinds & {*UNSUPPORTED})
        reason = failure(program, verdict)
        if reason is not None:
            failures.append(report(program, reason, verdict.message))
    print(f"\n{dict(outcomes)}\nrefused though separate: {dict(refused)}")  # noqa: T201
    assert not failures, f"{len(failures)} of {len(seeds)}\n" + "\n\n".join(failures[:5])
    assert outcomes["separate, right"] >= 0.5 * len(seeds)
    assert outcomes["mixing, refused"] >= 0.02 * len(seeds)
    for kind, count in refused.items():
        assert count <= UNSUPPORTED[kind] / 100 * len(seeds) + 3, kind


# Torch says once in a process that it does not check sparse indices.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_programs() -> None:
    """Programs of every kind."""
    check(range(80))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("part", range(20))
def test_many_programs(part: int) -> None:
    """Many more."""
    check(range(1000 * (part + 1), 1000 * (part + 2)))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_a_wrong_answer_is_seen() -> None:
    """One example's gradient too large by a millionth is a failure."""
    program = next(p for p in map(draw, range(50)) if judge(p).outcome == "right")
    found = exact(program)
    assert found.vectors.any()
    found.vectors[int(found.vectors.square().sum(dim=1).argmax())] *= 1 + 1e-6
    assert compared(program, found).outcome == "wrong"


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_loss_vectors(loss: nn.Module) -> None:
    """The closed forms of Hessians are what differentiating twice gives."""
    torch.manual_seed(0)
    output = torch.randn(1, 3, 2, dtype=torch.double)
    target = torch.rand(1, 3, 2, dtype=torch.double)
    if isinstance(loss, nn.CrossEntropyLoss):
        target = torch.randint(3, (1, 2))
    vectors = torch.stack([v.flatten() for v in loss_vectors(loss, output, target, "type2")])
    torch.testing.assert_close(vectors.T @ vectors, output_hessian(loss, output, target))
