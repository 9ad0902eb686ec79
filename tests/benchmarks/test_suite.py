"""The suite: what is run, what is kept, and what is made of it; runs are made up."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from benchmarks.configuration import Configuration
from benchmarks.methods import METHODS, Variant
from benchmarks.results import Job, Record, load, load_all, save
from benchmarks.suite import sweep as sweep_module
from benchmarks.suite.outcome import experiments, interval_within
from benchmarks.suite.run import orderings
from benchmarks.suite.sweep import Pool, Search, Sweep
from tests.benchmarks.helpers import make_record

SEARCHED = tuple(name for name, method in METHODS.items() if method.default_strength is not None)
UNSEARCHED = tuple(name for name in METHODS if name not in SEARCHED)


def flat(label: str, accuracy: float, **changes: Any) -> Record:
    return make_record(label, [[accuracy]], **changes)


def search(label: str, accuracies: dict[float, float]) -> list[Record]:
    """Records of a search, with one seed."""
    return [
        flat(label, accuracy, strength=strength, validate=True)
        for strength, accuracy in accuracies.items()
    ]


def experiment_of(records: Sequence[Record], scenario: str = "permuted_mnist") -> Any:
    (found,) = experiments((scenario, record) for record in records)
    return found


# What is to be run


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
        if job.variant.strength == "auto":
            return 0.8
        distance = math.log10(job.variant.strength) - math.log10(self.best(job.variant.name))
        return 0.9 - abs(distance) / 20

    def __call__(self, jobs: Sequence[Job]) -> list[Record]:
        self.stages.append(list(jobs))
        return [
            flat(
                job.variant.label,
                self.accuracy(job),
                seed=job.seed,
                strength=job.variant.strength,
                validate=job.configuration.validate,
            )
            for job in jobs
            if not self.failing(job)
        ]

    def strengths(self, stage: int, name: str) -> list[float]:
        """All numbers in order, 0 for a strength that the package finds, or where there is none."""
        jobs = self.stages[stage]
        given = [job.variant.strength for job in jobs if job.variant.name == name]
        return sorted(0.0 if strength in (None, "auto") else strength for strength in given)


def sweep(
    search: Search,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = (0,),
    scenario: str = "permuted_mnist",
    **options: Any,
) -> Sweep:
    return Sweep(Configuration(**options), methods, seeds, search, scenario, "mnist")


def at_centre(name: str) -> float:
    return METHODS[name].centre


@pytest.mark.parametrize(("values", "seeds"), [(5, (0,)), (3, (4, 5)), (1, (0,))])
def test_every_method_has_the_same_search(values: int, seeds: tuple[int, ...]) -> None:
    executor = Executor(at_centre)
    records = sweep(Search(values, seeds=seeds)).run(executor)
    first, second, tests = executor.stages
    numbers = [job for job in first if job.variant.strength != "auto"]
    for stage, each in ((numbers, values), (second, 2)):
        counts = Counter((job.variant.name, job.seed) for job in stage)
        assert counts == {(name, seed): each for name in SEARCHED for seed in seeds}
        assert all(job.configuration.validate for job in stage)
    assert not any(job.configuration.validate for job in tests)
    jobs = [job for stage in executor.stages for job in stage]
    assert len(records) == len(jobs) == len({repr(job.identity) for job in jobs})


@pytest.mark.parametrize(("scenario", "factor"), [("permuted_mnist", 1), ("split_mnist_task", 100)])
def test_the_search_is_around_the_middle_and_then_the_best(scenario: str, factor: float) -> None:
    """A hundred times higher in split streams; half a power of ten around the best."""
    off = {
        name: factor * METHODS[name].centre * 10.0 ** (n % 3 - 1) for n, name in enumerate(SEARCHED)
    }
    executor = Executor(off.__getitem__)
    sweep(Search(5), scenario=scenario).run(executor)
    for name, best in off.items():
        middle = factor * METHODS[name].centre
        expected = [middle * 10.0**power for power in (-2, -1, 0, 1, 2)]
        expected = [0.0] * METHODS[name].attached + expected
        assert executor.strengths(0, name) == pytest.approx(expected)
        expected = [best / math.sqrt(10), best * math.sqrt(10)]
        assert executor.strengths(1, name) == pytest.approx(expected, rel=0.005)


def test_the_best_of_both_searches_is_tested_beside_the_default() -> None:
    executor = Executor(lambda name: METHODS[name].centre * 31.6)
    sweep(Search(5), seeds=(0, 1)).run(executor)
    for name in SEARCHED:
        default = 0.0 if METHODS[name].attached else 1.0
        expected = sorted([default, METHODS[name].centre * 31.6] * 2)
        assert executor.strengths(2, name) == pytest.approx(expected, rel=0.005)
    for name in UNSEARCHED:
        assert [job.seed for job in executor.stages[2] if job.variant.name == name] == [0, 1]


def test_a_chosen_strength_that_is_the_default_is_tested_once() -> None:
    executor = Executor(lambda name: 1.0)
    sweep(Search(5)).run(executor)
    counts = Counter(job.variant.name for job in executor.stages[2])
    # One that the package finds is never the number that was chosen.
    assert counts == {name: 1 + method.attached for name, method in METHODS.items()}


def test_test_images_have_no_say_in_the_choice() -> None:
    chosen = []
    for accuracy in (0.0, 1.0):
        executor = Executor(at_centre, test_accuracy=accuracy)
        sweep(Search(3)).run(executor)
        chosen.append([(job.variant, job.seed) for job in executor.stages[-1]])
    assert chosen[0] == chosen[1]


def test_stages_can_be_left_out() -> None:
    executor = Executor(at_centre)
    sweep(Search(3, refine=False)).run(executor)
    finding = sum(method.attached for method in METHODS.values())
    assert [len(stage) for stage in executor.stages[:1]] == [3 * len(SEARCHED) + finding]
    assert len(executor.stages) == 2
    executor = Executor(at_centre)
    records = sweep(Search(0), seeds=(3,)).run(executor)
    (tests,) = executor.stages
    assert [job.variant.name for job in tests] == list(METHODS)
    assert {job.variant.strength for job in tests} == {None, 1.0, "auto"}
    assert {record.seed for record in records} == {3}


def test_failed_runs_are_passed_over() -> None:
    executor = Executor(at_centre)
    executor.failing = lambda job: job.variant.strength == METHODS[job.variant.name].centre
    sweep(Search(3), ("ewc", "naive")).run(executor)
    # 10 and 1000 are equally good: the smaller is refined, and beats itself from above.
    assert executor.strengths(1, "ewc") == pytest.approx([3.16, 31.6])
    assert executor.strengths(2, "ewc") == pytest.approx([1.0, 31.6])
    executor = Executor(at_centre)
    executor.failing = lambda job: job.configuration.validate
    sweep(Search(3), ("si",)).run(executor)
    assert executor.strengths(2, "si") == [1.0]


def test_a_replay_buffer_is_in_the_label_but_joint_training_needs_none() -> None:
    executor = Executor(at_centre)
    sweep(Search(1), ("ewc", "joint", "naive"), replay=20).run(executor)
    found = {job.variant.label: job.configuration.replay for job in executor.stages[-1]}
    assert found == {"ewc + replay 20": 20, "joint": 0, "naive + replay 20": 20}


# What is kept

JOB = Job(Variant("ewc", 1.0), 0, Configuration(), "permuted_mnist", "mnist")
OPTIONS: dict[str, Any] = {
    "scenario": "split_mnist",
    "increment": "class",
    "training_images": 600,
    "tasks": 3,
    "epochs": 7,
    "hidden": (100,),
    "batch_size": 17,
    "learning_rate": 0.5,
    "optimizer": "sgd",
    "schedule": "linear",
    "warm_up": 0.5,
    "validate": True,
    "every": 3,
    "plasticity": 0.5,
    "fisher_samples": 7,
    "fisher_type": "type2",
    "temperature": 2.0,
    "replay": 5,
    "device": "meta",
}


def test_every_run_has_a_file_of_its_own() -> None:
    """But for where images are: the name of the data says which they are."""
    assert OPTIONS.keys() == vars(Configuration()).keys() - {"images"}
    elsewhere = replace(JOB, configuration=Configuration(images=Path("a")))
    assert elsewhere.path(Path("folder")) == JOB.path(Path("folder"))
    others = [replace(JOB, configuration=Configuration(**{k: v})) for k, v in OPTIONS.items()]
    others += [replace(JOB, seed=1), replace(JOB, data_source="digits")]
    others += [replace(JOB, scenario="other"), replace(JOB, variant=Variant("ewc", 1.0000001))]
    others += [replace(JOB, variant=Variant(name, s)) for name, s in (("si", 1.0), ("ewc", None))]
    paths = {job.path(Path("folder")) for job in [JOB, *others]}
    assert len(paths) == len(others) + 1


def test_names_tell_what_is_inside() -> None:
    job = replace(JOB, configuration=Configuration(validate=True), seed=3)
    folder = Path("folder")
    assert job.path(folder).parent == folder / "permuted_mnist"
    assert job.path(folder).name.startswith("ewc_1_seed3_search_")
    naive = replace(JOB, variant=Variant("naive", None))
    assert naive.path(folder).name.startswith("naive_seed0_test_")
    assert str(job) == "permuted_mnist, search: ewc, λ = 1, seed 3"
    assert str(naive) == "permuted_mnist, test: naive, seed 0"
    found = replace(JOB, variant=Variant("rotated-ewc", "auto"))
    assert found.path(folder).name.startswith("rotated-ewc_auto_seed0_test_")
    assert str(found) == "permuted_mnist, test: rotated-ewc, λ = auto, seed 0"


def test_what_was_saved_is_loaded_but_for_damaged_files(tmp_path: Path) -> None:
    record = flat("ewc", 0.5)
    assert load(JOB, tmp_path) is None
    save(record, JOB, tmp_path)
    assert load(JOB, tmp_path) == record
    assert load(replace(JOB, seed=1), tmp_path) is None
    path = JOB.path(tmp_path)
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"
    document = json.loads(path.read_text(encoding="utf-8"))
    fields = document["records"][0]
    older = {name: value for name, value in fields.items() if name != "state_bytes"}
    for damaged in (
        *("", "[]", "{", json.dumps({**document, "format": "other/2"})),
        *(
            json.dumps({**document, "records": records})
            for records in ([], [fields] * 2, [older], [{**fields, "new": 1}], 3, [[1]])
        ),
    ):
        path.write_text(damaged, encoding="utf-8")
        assert load(JOB, tmp_path) is None
    path.write_bytes(b"\xff\xfe\x00")
    assert load(JOB, tmp_path) is None


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(flat("ewc", math.nan), JOB, tmp_path)
    assert not JOB.path(tmp_path).exists()


def test_all_records_of_folders_and_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for seed, folder in enumerate((first / "deep" / "deeper", second)):
        save(flat("ewc", 0.5, seed=seed), replace(JOB, seed=seed), folder)
    (first / "foreign.json").write_text('{"records": 1}', encoding="utf-8")
    (first / "broken.json").write_bytes(b"\xff{")
    (first / "notes.txt").write_text("no JSON", encoding="utf-8")
    found = load_all([first, first / "deep", replace(JOB, seed=1).path(second)])
    assert [(scenario, record.seed) for scenario, record in found] == [
        ("permuted_mnist", 0),
        ("permuted_mnist", 1),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no record in .*python -m benchmarks run"):
        load_all([tmp_path / "empty"])
    with pytest.raises(ValueError, match=f"got {tmp_path / 'absent'}, which does not exist"):
        load_all([first, tmp_path / "absent"])


# Many runs


def jobs_of(*names: str, seeds: tuple[int, ...] = (0,)) -> list[Job]:
    return [
        replace(JOB, variant=Variant(name, None), seed=seed) for seed in seeds for name in names
    ]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that were done, by a function that does nothing."""
    found: list[Job] = []

    def pretend(job: Job, data_root: Path, threads: int) -> Record:
        found.append(job)
        if job.variant.name == "ewc":
            raise RuntimeError("no luck")
        return flat(job.variant.label, 0.5, seed=job.seed)

    monkeypatch.setattr(sweep_module, "_run", pretend)
    return found


def test_nothing_is_run_twice_but_damaged_records(tmp_path: Path, done: list[Job]) -> None:
    jobs = jobs_of("naive", "joint", seeds=(0, 1))
    pool = Pool(tmp_path, tmp_path, threads=1)
    first = pool.execute(jobs[:2])
    second = pool.execute(jobs)
    assert done == jobs
    assert second[:2] == first
    jobs[2].path(tmp_path).write_text("{", encoding="utf-8")
    pool = Pool(tmp_path, tmp_path, threads=1)
    assert pool.execute(jobs) == second
    assert done == [*jobs, jobs[2]]


def test_a_failing_run_does_not_stop_others(
    tmp_path: Path, done: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of("ewc", "naive")
    pool = Pool(tmp_path, tmp_path, threads=1)
    (record,) = pool.execute(jobs)
    assert record.method == "naive"
    assert list(pool.failures) == [str(jobs[0])]
    assert "RuntimeError: no luck" in pool.failures[str(jobs[0])]
    assert capsys.readouterr().out.splitlines() == [
        "permuted_mnist, test: ewc, seed 0: failed: RuntimeError: no luck",
        "permuted_mnist, test: naive, seed 0: 50.00%",
    ]


@pytest.mark.slow
def test_two_processes_get_the_results_of_one(tmp_path: Path) -> None:
    """On the digits, which other processes have too."""
    configuration = Configuration(tasks=2, epochs=1, hidden=(4,))
    jobs = [replace(job, configuration=configuration) for job in jobs_of("naive", "joint")]
    matrices = []
    for workers in (1, 2):
        pool = Pool(tmp_path / str(workers), Path("/dev/null"), workers, 1)
        records = pool.execute(jobs)
        assert pool.failures == {}
        assert [record.configuration["jobs"] for record in records] == [workers] * 2
        matrices.append([record.accuracy_matrix for record in records])
    assert matrices[0] == matrices[1]


# What is made of it


def test_the_strength_is_chosen_on_held_out_images_alone() -> None:
    records = search("ewc", {1.0: 0.5, 10.0: 0.9, 100.0: 0.6})
    records += [
        flat("ewc", accuracy, strength=strength, seed=seed)
        for strength, accuracy in {1.0: 0.99, 10.0: 0.1}.items()
        for seed in range(2)
    ]
    (found,) = experiment_of(records).results
    assert (found.strength, found.default) == (10.0, 1.0)
    assert [record.strength for record in found.tested] == [10.0, 10.0]
    assert [record.strength for record in found.at_default] == [1.0, 1.0]
    assert [record.seed for record in found.tested] == [0, 1]
    assert list(found.search) == [1.0, 10.0, 100.0]
    assert len(found.searched) == 3
    assert len(found.records) == 7


def test_a_strength_that_the_package_finds_is_beside_the_chosen_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = replace(METHODS["rotated-ewc"], default_strength="auto")
    monkeypatch.setitem(METHODS, "rotated-ewc", method)
    executor = Executor(at_centre)
    sweep(Search(3), ("rotated-ewc",)).run(executor)
    assert executor.stages[0][-1].variant.strength == "auto"
    assert executor.stages[0][-1].configuration.validate
    assert [job.variant.strength for job in executor.stages[-1]] == ["auto", 1.0]
    records = search("rotated-ewc", {1.0: 0.5, 10.0: 0.9})
    records += [flat("rotated-ewc", a, strength=s) for s, a in ((10.0, 0.8), ("auto", 0.7))]
    (found,) = experiment_of(records).results
    assert (found.strength, found.default) == (10.0, "auto")
    assert [one[0].average_accuracy for one in (found.tested, found.at_default)] == [0.8, 0.7]
    assert found.regret is None
    for accuracy, regret in ((0.6, 0.3), (0.95, -0.05)):
        held_out = flat("rotated-ewc", accuracy, strength="auto", validate=True)
        (found,) = experiment_of([*records, held_out]).results
        assert (found.strength, found.found, len(found.search)) == (10.0, [held_out], 2)
        assert found.regret == pytest.approx(regret)
    (found,) = experiment_of(records[-1:]).results
    assert (found.strength, found.tested) == ("auto", found.at_default)


def test_the_mean_over_seeds_decides_and_of_equals_the_smallest() -> None:
    records = [
        flat("ewc", accuracy, strength=strength, seed=seed, validate=True)
        for strength, accuracies in {10.0: [0.9, 0.1], 1.0: [0.5, 0.5], 0.1: [0.4, 0.6]}.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    for order in list(permutations(records))[::101]:
        assert experiment_of(order).results[0].strength == 0.1


@pytest.mark.parametrize(
    ("best", "at_edge"), [(0.1, True), (1.0, False), (10.0, False), (100.0, True)]
)
def test_a_choice_at_the_edge_is_told(best: float, at_edge: bool) -> None:
    accuracies = dict.fromkeys((0.1, 1.0, 10.0, 100.0), 0.5) | {best: 0.6}
    assert experiment_of(search("ewc", accuracies)).results[0].at_edge == at_edge
    assert not experiment_of(search("ewc", {1.0: 0.5})).results[0].at_edge


def test_results_may_be_missing() -> None:
    records = [*search("ewc", {1.0: 0.5, 10.0: 0.9}), flat("ewc", 0.7, strength=1.0)]
    (found,) = experiment_of(records).results
    assert (found.strength, found.tested, len(found.at_default)) == (10.0, [], 1)
    (found,) = experiment_of([flat("naive", 0.5)]).results
    assert (found.strength, found.default, found.search) == (None, None, {})
    assert found.tested == found.at_default
    (found,) = experiment_of([flat("forgotten", 0.5, strength=2.0)]).results
    assert (found.strength, found.default, len(found.tested)) == (2.0, None, 1)


def test_methods_are_in_their_order_with_replay_beside() -> None:
    labels = ["joint", "forgotten", "rotated-ewc", "ewc + replay 20", "ewc", "naive"]
    found = [result.label for result in experiment_of([flat(one, 0.5) for one in labels]).results]
    assert found == ["naive", "ewc", "ewc + replay 20", "rotated-ewc", "joint", "forgotten"]


def test_experiments_are_told_apart_by_their_setting_alone() -> None:
    records = [
        ("a", flat("naive", 0.5)),
        ("a", flat("naive", 0.5, configuration={"epochs": 7})),
        ("a", flat("naive", 0.5, configuration={"data": "digits"})),
        ("b", flat("naive", 0.5)),
    ]
    assert [found.scenario for found in experiments(records)] == ["a", "a", "a", "b"]
    changes = {"threads": 7, "device": "cuda", "jobs": 2, "replay": 20, "validate": True}
    other = flat("ewc", 0.5, configuration=changes)
    assert [result.label for result in experiment_of([flat("naive", 0.5), other]).results] == [
        "naive",
        "ewc",
    ]


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({1.0: 0.5}, "≥ 0.0"),
        ({1.0: 0.80, 10.0: 0.90, 100.0: 0.80}, "0.6"),
        ({1.0: 0.84, 10.0: 0.90, 100.0: 0.87}, "≥ 1.5"),  # three points are allowed
        ({1.0: 0.90, 10.0: 0.80}, "≥ 0.3"),  # best at the edge
        # Another crossing, further out, does not count: 3/11 + 0.5.
        ({0.1: 0.90, 1.0: 0.80, 10.0: 0.91, 100.0: 0.85, 1e3: 0.90}, "0.8"),
        ({0.0: 0.9, 1.0: 0.8, 10.0: 0.7}, "≥ 0.3"),  # zero has no logarithm
        ({}, "None"),
    ],
)
def test_width_of_the_optimum(accuracies: dict[float, float], expected: str) -> None:
    for scale in (1.0, 1e-3):
        groups = {scale * strength: [flat("ewc", a)] for strength, a in accuracies.items()}
        assert str(interval_within(groups)) == expected


def test_an_interval_has_ends_of_its_own() -> None:
    groups = {s: [flat("ewc", a)] for s, a in ((1.0, 0.80), (10.0, 0.90), (100.0, 0.89))}
    interval = interval_within(groups)
    assert interval is not None
    assert (interval.low, interval.high) == (pytest.approx(-0.3), pytest.approx(1.0))
    assert (interval.open_low, interval.open_high) == (False, True)


def test_the_order_of_methods_is_checked_where_penalties_can_help() -> None:
    accuracies = {"naive": (0.5, 0.5), "ewc": (0.9, 0.2), "si": (0.1,), "rotated-ewc": (0.5,)}
    records = [
        flat(name, accuracy, seed=seed)
        for name, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    assert orderings([experiment_of(records)]) == {
        "permuted_mnist: rotated-ewc 50.00% > ewc 55.00%: NOT SO": False,
        "permuted_mnist: ewc 55.00% > naive 50.00%": True,
    }
    assert list(orderings([experiment_of(records[:2] + records[-1:])]).values()) == [False]
    assert orderings([experiment_of(records, "split_mnist_class")]) == {}
    assert orderings([experiment_of(search("ewc", {1.0: 0.5}))]) == {}
