"""Many runs, in this process and in others."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.configuration import Configuration
from benchmarks.methods import Variant
from benchmarks.records import Record
from benchmarks.suite import pool as pool_module
from benchmarks.suite.pool import Pool
from benchmarks.suite.store import Job, load
from tests.benchmarks.suite_records import flat

TIMES = ("training_seconds", "estimation_seconds", "penalty_ms_per_step", "configuration")


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(struct.pack(">i", 0x0800 + array.ndim) + sizes + array.tobytes())


@pytest.fixture
def mnist_root(tmp_path: Path) -> Path:
    """A data root with a very small MNIST that other processes can read too."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in (("train", 60), ("t10k", 40)):
        images = generator.integers(256, size=(size, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(size, dtype=np.uint8) % 10)
    return tmp_path / "root"


def jobs_of(*names: str, seeds: tuple[int, ...] = (0,), **options: object) -> list[Job]:
    configuration = Configuration(
        **({"scenario": "split_mnist", "tasks": 2, "epochs": 1, "hidden": (4,)} | options)
    )
    return [
        Job(Variant(name, name, None), seed, configuration, "split_mnist_task", "mnist")
        for seed in seeds
        for name in names
    ]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that were done, by a function that does nothing."""
    found: list[Job] = []

    def pretend(job: Job, threads: int) -> Record:
        found.append(job)
        if job.variant.name == "ewc":
            raise RuntimeError("no luck")
        return flat(job.variant.label, 0.5, seed=job.seed)

    monkeypatch.setattr(pool_module, "_run", pretend)
    return found


def test_nothing_is_run_twice(tmp_path: Path, done: list[Job]) -> None:
    jobs = jobs_of("naive", "joint", seeds=(0, 1))
    with Pool(tmp_path, 1, 1) as pool:
        first = pool.execute(jobs[:2])
        second = pool.execute(jobs)
    with Pool(tmp_path, 1, 1) as pool:
        third = pool.execute(jobs)
    assert done == jobs
    assert second == third
    assert second[:2] == first
    assert [(record.method, record.seed) for record in second] == [
        (job.variant.name, job.seed) for job in jobs
    ]


def test_a_damaged_record_is_run_again(tmp_path: Path, done: list[Job]) -> None:
    (job,) = jobs_of("naive")
    with Pool(tmp_path, 1, 1) as pool:
        pool.execute([job])
        job.path(tmp_path).write_text("{", encoding="utf-8")
        (record,) = pool.execute([job])
    assert done == [job, job]
    assert load(job, tmp_path) == record


def test_a_failing_run_does_not_stop_others(
    tmp_path: Path, done: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of("ewc", "naive")
    with Pool(tmp_path, 1, 1) as pool:
        (record,) = pool.execute(jobs)
        assert record.method == "naive"
        assert list(pool.failures) == [str(jobs[0])]
        assert "RuntimeError: no luck" in pool.failures[str(jobs[0])]
        pool.execute(jobs)
    assert [job.variant.name for job in done] == ["ewc", "naive", "ewc"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "split_mnist_task, test: ewc, seed 0: failed: RuntimeError: no luck"
    assert lines[1] == "split_mnist_task, test: naive, seed 0: 50.00%"


def test_an_interruption_keeps_what_is_finished(
    tmp_path: Path, done: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of("naive", "joint")
    pretend = pool_module._run

    def interrupted(job: Job, threads: int) -> Record:
        if job.variant.name == "joint":
            raise KeyboardInterrupt
        return pretend(job, threads)

    monkeypatch.setattr(pool_module, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt), Pool(tmp_path, 1, 1) as pool:
        pool.execute(jobs)
    monkeypatch.setattr(pool_module, "_run", pretend)
    with Pool(tmp_path, 1, 1) as pool:
        assert len(pool.execute(jobs)) == 2
    assert done == jobs


def test_an_experiment_uses_the_images_of_its_options_alone(
    tmp_path: Path, mnist_root: Path
) -> None:
    sizes = []
    with Pool(tmp_path / "results", 1, 1) as pool:
        for options in ({}, {"training_images": 36}, {"training_images": 36, "validate": True}):
            (job,) = jobs_of("naive", data_root=mnist_root, **options)
            assert len(pool.execute([job])) == 1
            data = pool_module._images(
                replace(Configuration(scenario="split_mnist"), data_root=mnist_root, **options)
            )
            sizes.append((len(data.train_inputs), len(data.test_inputs)))
    assert sizes == [(60, 40), (36, 40), (30, 6)]


@pytest.mark.slow
def test_two_processes_get_the_results_of_one(tmp_path: Path, mnist_root: Path) -> None:
    jobs = jobs_of("naive", "joint", data_root=mnist_root)
    plain = []
    for workers in (1, 2):
        with Pool(tmp_path / str(workers), workers, 1) as pool:
            records = pool.execute(jobs)
            assert pool.failures == {}
        assert [record.configuration["jobs"] for record in records] == [workers] * 2
        plain.append([{k: v for k, v in vars(one).items() if k not in TIMES} for one in records])
    assert plain[0] == plain[1]
    assert len(plain[0]) == 2
