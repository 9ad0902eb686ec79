"""The cost of the penalty in a training step: what is printed."""

import re

import pytest
import torch

from benchmarks.tangent_cost import main


def test_prints_every_way_beside_the_plain_step(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["--hidden", "8", "--rounds", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = re.findall(r"^(\S.*?) +(\d+\.\d\d) ms +([+-]\d+) %$", capsys.readouterr().out, re.M)
    names = [name for name, _, _ in rows]
    tangents = [f"tangent, every {every}" for every in (5, 10, 20)]
    assert names == ["plain", "in the loss", *tangents]
    assert rows[0][2] == "+0"
    assert all(float(milliseconds) > 0 for _, milliseconds, _ in rows)


def test_bad_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
    assert "--rounds" in capsys.readouterr().err
