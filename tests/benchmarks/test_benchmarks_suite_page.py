"""The report and its files."""

import re
from base64 import b64decode
from html.parser import HTMLParser

import pytest
from suite_records import SPECTRA, experiment, flat, result, searched

from benchmarks.files import replace_file
from benchmarks.suite.figures import DRAWINGS
from benchmarks.suite.files import unique_names
from benchmarks.suite.page import html_report, write_figures, write_report

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects what tests look at, and checks that every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def shown():
    """Two methods, with something for each figure."""
    naive = [flat("naive", 0.5)]
    return experiment(
        result("naive", tested=naive, at_default=naive),
        result(
            "rotated-ewc",
            search=searched("rotated-ewc", {1.0: 0.6, 10.0: 0.7}),
            tested=[flat("rotated-ewc", 0.7, strength=10.0, spectra=SPECTRA)],
            strength=10.0,
        ),
    )


@pytest.fixture(scope="module")
def text(shown) -> str:
    """The page with one experiment."""
    return html_report([shown])


def test_the_page_is_well_formed_and_complete(text) -> None:
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("img")) == len(DRAWINGS)
    assert all(image["alt"].strip() for image in page.all("img"))
    assert ("th", "naive") in page.texts
    assert ("strong", "rotated-ewc") in page.texts
    assert ("strong", "70.00") in page.texts
    assert not page.all("nav")  # nothing to choose from


def test_the_page_loads_nothing(text) -> None:
    page = Page(text)
    for _, attributes in page.found:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml;base64,"))
    assert not page.all("script")
    assert not page.all("link")
    assert "url(" not in text
    assert "@import" not in text
    for image in page.all("img"):
        picture = b64decode(image["src"].partition(",")[2]).decode()
        assert "<svg" in picture
        assert not re.search(r'(src|href)="(?!#|data:)', picture)


def test_several_experiments_have_a_table_of_contents() -> None:
    page = Page(html_report([experiment(), experiment()]))
    assert [link["href"] for link in page.all("a")] == ["#permuted_mnist", "#permuted_mnist-2"]
    assert [part["id"] for part in page.all("section")] == ["permuted_mnist", "permuted_mnist-2"]


def test_what_comes_from_records_is_escaped(tmp_path) -> None:
    evil = "<script>alert('&')</script>"
    tested = [flat(evil, 0.5, versions={"python": evil}, configuration={"device": evil})]
    attack = experiment(result(evil, tested=tested), scenario=f'"{evil}/../../x')
    paths = write_report([attack], tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.all("script")
    assert ("th", evil) in page.texts
    assert {path.parent for path in paths} == {tmp_path}
    assert "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_files_of_a_report(shown, tmp_path) -> None:
    folder = tmp_path / "new" / "folder"
    paths = write_report([shown, shown], folder)
    pictures = [
        f"{name}-{drawing.name}.png"
        for name in ("permuted_mnist", "permuted_mnist-2")
        for drawing in DRAWINGS
    ]
    assert [path.name for path in paths] == ["report.html", "report.md", *pictures]
    assert sorted(folder.iterdir()) == sorted(paths)  # no temporary file is left
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(([^)]*)\)", text) == pictures
    assert text.count("\n## permuted\\_mnist\n") == 2
    for path in paths[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_figures_without_records_are_left_out(tmp_path) -> None:
    half = experiment(result("naive", tested=[flat("naive", 0.5)]))
    names = [path.name for path in write_figures([half], tmp_path)]
    kinds = ("accuracy", "forgetting", "tasks", "cost")
    assert names == [f"permuted_mnist-{kind}.png" for kind in kinds]
    write_report([half, experiment()], tmp_path)
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "spectra.png" not in text


@pytest.mark.parametrize("write", [write_report, write_figures])
def test_nothing_to_report_is_refused(write, tmp_path) -> None:
    with pytest.raises(ValueError, match="got none, expected at least one; make results first"):
        write([], tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_same_records_make_the_same_page(shown, text) -> None:
    assert html_report([shown]) == text


@pytest.mark.parametrize(
    ("scenarios", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "A", "a-2"], ["a", "a-2", "A-3", "a-2-2"]),
        (["../x y", "", "é"], ["x-y", "experiment", "experiment-2"]),
    ],
)
def test_names_of_files_are_plain_and_different(scenarios, names) -> None:
    assert unique_names(scenarios) == names


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch) -> None:
    path = replace_file(tmp_path / "file", "old λ")

    def fail(*names: object) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="full"):
        replace_file(path, b"new")
    assert path.read_text(encoding="utf-8") == "old λ"
    assert list(tmp_path.iterdir()) == [path]
