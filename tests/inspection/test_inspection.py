"""`python -m rotate_ewc`: numbers against dense matrices, and what a user sees."""

from __future__ import annotations

import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.inspection.command import main
from rotate_ewc.inspection.comparison import compare
from rotate_ewc.inspection.snapshot_file import read
from rotate_ewc.inspection.summary import summaries
from rotate_ewc.io import header
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance
from tests.helpers import golden
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import dense_block

NEWEST = golden.DATA / f"operator-{golden.VERSION}.safetensors"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


def operator(*blocks: Block) -> EKFACLinearOperator:
    shapes = {b.parameters[0]: tuple(b.eigenvalues.shape[1:]) for b in blocks}
    return EKFACLinearOperator.from_blocks(blocks, shapes, Provenance("L", "mean", "mc", 1, 1.0))


def random_block(name: str, seed: int, d_out: int = 4, d_in: int = 3) -> Block:
    generator = torch.Generator().manual_seed(seed)

    def basis(size: int) -> Tensor:
        normal = torch.randn(1, size, size, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal)[0]

    values = torch.rand(1, d_out, d_in, generator=generator, dtype=torch.float64) ** 4
    return Block((name,), basis(d_out), basis(d_in), values)


def test_summaries_against_dense_matrices() -> None:
    for block, summary in zip(golden.blocks(), summaries(golden.operator()), strict=True):
        spectrum = torch.cat([torch.linalg.eigvalsh(m) for m in dense_block(block)])
        nonzero = spectrum[spectrum > 1e-12]
        assert summary.trace == pytest.approx(spectrum.sum().item())
        assert summary.rank == len(nonzero)
        assert summary.condition == pytest.approx((nonzero.max() / nonzero.min()).item())
        participation = spectrum.sum() ** 2 / spectrum.square().sum()
        assert summary.effective_rank == pytest.approx(participation.item())
        assert summary.nbytes == sum(8 * t.numel() for t in block.tensors.values())


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_summaries_at_any_scale(scale: float) -> None:
    block = random_block("w", 0)
    plain = summaries(operator(block))[0]
    scaled = summaries(operator(block.with_eigenvalues(block.eigenvalues * scale)))[0]
    assert scaled.effective_rank == pytest.approx(plain.effective_rank)
    assert scaled.condition == pytest.approx(plain.condition)


def test_summary_of_nothing() -> None:
    zeros = Block(("w",), None, None, torch.zeros(1, 2, 3))
    summary = summaries(operator(zeros))[0]
    assert (summary.trace, summary.rank, summary.effective_rank) == (0.0, 0, 0.0)
    assert math.isnan(summary.condition)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_comparison_against_dense_matrices(scale: float) -> None:
    first, second = random_block("w", 1), random_block("w", 2)
    second = second.with_eigenvalues(second.eigenvalues * scale)
    found = compare(operator(first), operator(second)).blocks[0]
    a, b = dense_block(first)[0], dense_block(second)[0] / scale
    assert found.trace_ratio / scale == pytest.approx((b.trace() / a.trace()).item())
    cosine = (a * b).sum() / torch.linalg.matrix_norm(a) / torch.linalg.matrix_norm(b)
    assert found.cosine == pytest.approx(cosine.item())
    spectra, vectors = zip(*(torch.linalg.eigh(m) for m in (a, b)), strict=True)
    k = round((spectra[0].sum() ** 2 / spectra[0].square().sum()).item())
    assert found.dimension == k
    projections = [v[:, -k:] @ v[:, -k:].T for v in vectors]
    assert found.overlap == pytest.approx(((projections[0] @ projections[1]).trace() / k).item())


def test_comparison_with_itself_and_with_zero() -> None:
    block = random_block("w", 3)
    same = compare(operator(block), operator(block)).blocks[0]
    assert (same.trace_ratio, same.cosine, same.overlap) == pytest.approx((1.0, 1.0, 1.0))
    zero = block.with_eigenvalues(torch.zeros_like(block.eigenvalues))
    found = compare(operator(zero), operator(block)).blocks[0]
    assert all(map(math.isnan, (found.trace_ratio, found.cosine, found.overlap)))
    assert found.dimension == 0


def test_comparison_of_different_blocks() -> None:
    first = operator(random_block("a", 0), random_block("b", 1), random_block("d", 1))
    second = operator(random_block("b", 1, d_out=5), random_block("c", 2), random_block("d", 4))
    found = compare(first, second)
    assert [block.label for block in found.blocks] == ["d"]
    assert (found.different, found.only_first, found.only_second) == (("b",), ("a",), ("c",))


def test_comparison_of_an_identity_basis_with_a_rotated_one() -> None:
    rotated = random_block("w", 5)
    plain = Block(("w",), None, None, torch.rand(1, 4, 3, dtype=torch.float64))
    for first, second in ((rotated, plain), (plain, rotated)):
        found = compare(operator(first), operator(second)).blocks[0]
        a, b = dense_block(first)[0], dense_block(second)[0]
        cosine = (a * b).sum() / torch.linalg.matrix_norm(a) / torch.linalg.matrix_norm(b)
        assert found.cosine == pytest.approx(cosine.item())


def test_inspect_shows_every_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(NEWEST)]) == 0
    shown = capsys.readouterr().out
    assert "format rotate_ewc.operator/1, written by rotate_ewc" in shown
    assert "mc Fisher of CrossEntropyLoss (mean), N = 1000; 78 parameters, float64" in shown
    assert "estimated with: mc_samples 1, seed 7" in shown
    for block in golden.blocks():
        row = next(line for line in shown.splitlines() if line.split()[:1] == [block.label])
        assert f"{dense_block(block).diagonal(dim1=1, dim2=2).sum().item():.4g}" in row.split()
    assert "1/3 × 2/6" in shown
    assert "62.62" in shown


def test_inspect_shows_every_term_of_a_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(golden.DATA / f"penalty-{golden.VERSION}.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "2 tasks in 2 terms" in shown
    assert "strength 3.0, mode separate" in shown
    assert "term 0: mc Fisher" in shown
    assert "term 1: mc Fisher" in shown


def test_names_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    operator(random_block("[red]w[/red]", 0)).save(tmp_path / "[bold]file")
    assert main(["inspect", str(tmp_path / "[bold]file")]) == 0
    shown = capsys.readouterr().out
    assert "[red]w[/red]" in shown
    assert "[bold]file" in shown


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot_is_drawn(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"spectra.{ending}"
    assert main(["inspect", str(NEWEST), "--plot", str(picture)]) == 0
    beginning = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert picture.read_bytes().startswith(beginning)


def test_plot_shows_the_eigenvalues() -> None:
    pytest.importorskip("matplotlib")
    from rotate_ewc.inspection.figure import draw_spectra

    axes = draw_spectra(golden.operator(), "title").axes[0]
    assert len(axes.lines) == 6
    ranks, values = axes.lines[0].get_data()
    assert list(ranks) == list(range(1, 12))
    assert list(values) == [n / 8 for n in range(11, 0, -1)]
    # Thin: of one direction of outputs and two, the first of inputs and four.
    ranks, values = axes.lines[5].get_data()
    thin = golden.blocks()[5]
    assert list(ranks) == list(range(1, 18))
    assert list(values) == [*[5 / 8] * 8, *[4 / 8] * 2, *[3 / 8] * 2, *[2 / 8] * 4, 1 / 8]
    assert dense_block(thin).diagonal(dim1=1, dim2=2).sum() == pytest.approx(sum(values))


def test_plot_of_nothing_but_zeros(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    operator(Block(("w",), None, None, torch.zeros(1, 2, 3))).save(tmp_path / "zeros")
    assert main(["inspect", str(tmp_path / "zeros"), "--plot", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").exists()


def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "rotate_ewc.inspection.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inspect", str(NEWEST), "--plot", str(tmp_path / "s.png")]) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing"], "there is no snapshot file 'nothing'"),
        (["inspect", __file__], "test_inspection.py': this is not a snapshot file"),
        (["diff", str(NEWEST), "nothing"], "there is no snapshot file 'nothing'"),
    ],
)
def test_errors_are_told_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("python -m rotate_ewc: error: ")
    assert "Traceback" not in told


def test_plot_of_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["inspect", str(NEWEST), "--plot", "spectra.xyz"]) == 1
    assert "xyz" in capsys.readouterr().err


def test_diff_shows_every_block(capsys: pytest.CaptureFixture[str]) -> None:
    reduced = golden.DATA / f"operator-{golden.VERSION}-bfloat16.safetensors"
    assert main(["diff", str(NEWEST), str(reduced)]) == 0
    shown = capsys.readouterr().out
    for block in golden.blocks():
        row = next(line for line in shown.splitlines() if line.split()[:1] == [block.label])
        ratio, cosine, _, overlap = map(float, row.split()[-4:])
        assert (ratio, cosine) == pytest.approx((1.0, 1.0), abs=2e-3)
        assert overlap > 0.9


def test_diff_takes_the_last_term(tmp_path: Path) -> None:
    assert len(read(golden.DATA / f"penalty-{golden.VERSION}.safetensors").operators) == 2
    assert (
        main(["diff", str(golden.DATA / f"penalty-{golden.VERSION}.safetensors"), str(NEWEST)]) == 0
    )


def test_penalties_without_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact_penalty().save(tmp_path / "empty")
    assert main(["inspect", str(tmp_path / "empty")]) == 0
    assert "0 tasks in 0 terms" in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "empty"), str(NEWEST)]) == 1
    assert "a penalty without tasks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "raised", "message"),
    [
        ("rich", SystemExit, r"error: this needs rich: pip install 'rotate-ewc\[cli\]'$"),
        ("argparse", ModuleNotFoundError, "import of argparse halted"),
    ],
)
def test_without_rich(
    missing: str, raised: type[BaseException], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says how to install it, and fails; any other module that is missing is not hidden."""
    for name in [name for name in sys.modules if name.startswith("rotate_ewc.inspection.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["rotate_ewc", "inspect", "x"])
    with pytest.raises(raised, match=message):
        runpy.run_module("rotate_ewc", run_name="__main__", alter_sys=True)


def test_headers_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def decode(text: str) -> Any:
        calls.append(text)
        return header_decoder.decode(text)

    header_decoder = header._DECODER
    monkeypatch.setattr(header, "_DECODER", SimpleNamespace(decode=decode))
    for kind in ("operator", "penalty"):
        read(golden.DATA / f"{kind}-{golden.VERSION}.safetensors")
    assert len(calls) == 2


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "rotate_ewc", "inspect", str(NEWEST)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "layer.weight" in done.stdout


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "inspect | diff" in capsys.readouterr().err
