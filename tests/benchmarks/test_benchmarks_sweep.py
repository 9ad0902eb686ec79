"""The search, with runs whose accuracies are known."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from benchmarks.configuration import Configuration
from benchmarks.methods import METHODS
from benchmarks.records import Record
from benchmarks.suite.store import Job
from benchmarks.suite.sweep import Search, Sweep
from tests.benchmarks.suite_records import flat

SEARCHED = tuple(name for name, method in METHODS.items() if method.default_strength is not None)
UNSEARCHED = tuple(name for name in METHODS if name not in SEARCHED)


class Executor:
    """Makes records in place of runs: accuracy falls with the distance from the best strength."""

    def __init__(self, best: Callable[[str], float], test_accuracy: float | None = None) -> None:
        self.best = best
        self.test_accuracy = test_accuracy
        self.stages: list[list[Job]] = []
        self.failing: Callable[[Job], bool] = lambda job: False

    def accuracy(self, job: Job) -> float:
        if job.variant.strength is None:
            return 0.5
        if not job.configuration.validate and self.test_accuracy is not None:
            return self.test_accuracy
        distance = math.log10(job.variant.strength) - math.log10(self.best(job.variant.name))
        return 0.9 - abs(distance) / 20

    def __call__(self, jobs: Sequence[Job]) -> list[Record]:
        self.stages.append(list(jobs))
        return [
            flat(
                job.variant.label,
                self.accuracy(job),
                method=job.variant.name,
                seed=job.seed,
                strength=job.variant.strength,
                validate=job.configuration.validate,
            )
            for job in jobs
            if not self.failing(job)
        ]


def sweep(search: Search, **options: object) -> Sweep:
    configuration = Configuration(**({"methods": tuple(METHODS)} | options))
    return Sweep(configuration, search, "permuted_mnist", "mnist")


def at_centre(name: str) -> float:
    return METHODS[name].centre


def strengths(jobs: Sequence[Job], name: str) -> list[float]:
    return sorted(job.variant.strength for job in jobs if job.variant.name == name)


@pytest.mark.parametrize(("values", "seeds"), [(5, (0,)), (3, (4, 5)), (1, (0,))])
def test_every_method_has_the_same_search(values: int, seeds: tuple[int, ...]) -> None:
    executor = Executor(at_centre)
    sweep(Search(values, seeds=seeds)).run(executor)
    first, second, tests = executor.stages
    for stage, each in ((first, values), (second, 2)):
        counts = Counter((job.variant.name, job.seed) for job in stage)
        assert counts == {(name, seed): each for name in SEARCHED for seed in seeds}
        assert all(job.configuration.validate for job in stage)
    assert not any(job.configuration.validate for job in tests)


def test_the_first_search_is_powers_of_ten_around_the_middle() -> None:
    executor = Executor(at_centre)
    sweep(Search(5)).run(executor)
    for name in SEARCHED:
        centre = METHODS[name].centre
        expected = [centre * 10.0**power for power in (-2, -1, 0, 1, 2)]
        assert strengths(executor.stages[0], name) == pytest.approx(expected)


def test_split_streams_are_searched_a_hundred_times_higher() -> None:
    executor = Executor(at_centre)
    Sweep(
        Configuration(scenario="split_mnist", methods=tuple(METHODS)),
        Search(3),
        "split_mnist_class",
        "mnist",
    ).run(executor)
    for name in SEARCHED:
        expected = [METHODS[name].centre * factor for factor in (10, 100, 1_000)]
        assert strengths(executor.stages[0], name) == pytest.approx(expected)


def test_the_second_search_is_half_a_power_around_the_best_of_each_method() -> None:
    off = {name: METHODS[name].centre * 10.0 ** (n % 3 - 1) for n, name in enumerate(SEARCHED)}
    executor = Executor(off.__getitem__)
    sweep(Search(5)).run(executor)
    for name, best in off.items():
        expected = [best / math.sqrt(10), best * math.sqrt(10)]
        assert strengths(executor.stages[1], name) == pytest.approx(expected, rel=0.005)


def test_the_best_of_both_searches_is_tested_beside_the_default() -> None:
    executor = Executor(lambda name: METHODS[name].centre * 31.6)
    sweep(Search(5), seeds=(0, 1)).run(executor)
    tests = executor.stages[2]
    for seed in (0, 1):
        of_seed = [job for job in tests if job.seed == seed]
        for name in SEARCHED:
            method = METHODS[name]
            expected = sorted([method.default_strength, method.centre * 31.6])
            assert strengths(of_seed, name) == pytest.approx(expected, rel=0.005)
    for name in UNSEARCHED:
        assert [job.seed for job in tests if job.variant.name == name] == [0, 1]


def test_a_chosen_strength_that_is_the_default_is_tested_once() -> None:
    executor = Executor(lambda name: METHODS[name].default_strength)
    sweep(Search(5)).run(executor)
    counts = Counter(job.variant.name for job in executor.stages[2])
    assert counts == dict.fromkeys(METHODS, 1)


def test_no_job_is_asked_for_twice() -> None:
    executor = Executor(at_centre)
    sweep(Search(5, seeds=(0, 1)), seeds=(0, 1, 2)).run(executor)
    jobs = [job for stage in executor.stages for job in stage]
    assert len({repr(job.identity) for job in jobs}) == len(jobs)


def test_test_images_have_no_say_in_the_choice() -> None:
    chosen = []
    for accuracy in (0.0, 1.0):
        executor = Executor(at_centre, test_accuracy=accuracy)
        sweep(Search(3)).run(executor)
        chosen.append([(job.variant, job.seed) for job in executor.stages[-1]])
    assert chosen[0] == chosen[1]


def test_without_a_search_defaults_are_tested() -> None:
    executor = Executor(at_centre)
    records = sweep(Search(0), seeds=(3,)).run(executor)
    (tests,) = executor.stages
    assert [job.variant.name for job in tests] == list(METHODS)
    assert {job.variant.strength for job in tests} == {None, 1.0}
    assert [record.seed for record in records] == [3] * len(METHODS)


def test_without_a_refinement_there_is_one_search() -> None:
    executor = Executor(at_centre)
    sweep(Search(3, refine=False)).run(executor)
    assert [len(stage) for stage in executor.stages[:1]] == [3 * len(SEARCHED)]
    assert len(executor.stages) == 2


def test_all_records_are_returned() -> None:
    executor = Executor(at_centre)
    records = sweep(Search(3)).run(executor)
    assert len(records) == sum(len(stage) for stage in executor.stages)


def test_failed_runs_are_passed_over() -> None:
    executor = Executor(at_centre)
    executor.failing = lambda job: job.variant.strength == METHODS[job.variant.name].centre
    sweep(Search(3), methods=("ewc", "naive")).run(executor)
    # 10 and 1000 are equally good: the smaller is refined, and beats itself from above.
    assert strengths(executor.stages[1], "ewc") == pytest.approx([3.16, 31.6])
    assert strengths(executor.stages[2], "ewc") == pytest.approx([1.0, 31.6])


def test_a_method_of_which_all_searches_failed_is_tested_at_its_default() -> None:
    executor = Executor(at_centre)
    executor.failing = lambda job: job.variant.name == "si" and job.configuration.validate
    sweep(Search(3), methods=("si", "ewc")).run(executor)
    assert strengths(executor.stages[1], "si") == []
    assert strengths(executor.stages[2], "si") == [1.0]


def test_a_replay_buffer_is_in_the_label_alone() -> None:
    executor = Executor(at_centre)
    sweep(Search(1), methods=("ewc", "naive"), replay=20).run(executor)
    variants = {(job.variant.name, job.variant.label) for job in executor.stages[-1]}
    assert variants == {("ewc", "ewc + replay 20"), ("naive", "naive + replay 20")}


def test_joint_training_needs_no_buffer() -> None:
    executor = Executor(at_centre)
    sweep(Search(0), methods=("joint", "naive"), replay=20).run(executor)
    (tests,) = executor.stages
    found = {job.variant.label: job.configuration.replay for job in tests}
    assert found == {"joint": 0, "naive + replay 20": 20}
