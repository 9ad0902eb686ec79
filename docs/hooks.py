"""What the site shows besides the pages in this folder, and where their links lead.

* `README.md`, `CONTRIBUTING.md` and `CHANGELOG.md` are pages.
* Each script in `examples/` is a page of the gallery: comments after `# %%` are its text. What the
  script printed and drew is in `docs/gallery/`, where `docs/gallery/run.py` puts it.
* Each public name is a page of the reference. The build fails if one has no docstring.
* Links to other files of the repository lead to copies of them in the site.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
MODULES = (
    "rotate_ewc",
    "rotate_ewc.integrations.avalanche",
    "rotate_ewc.integrations.transformers",
    "rotate_ewc.integrations.lightning",
    "rotate_ewc.integrations.peft",
)
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of other files."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    for script in sorted((ROOT / "examples").glob("*.py")):
        pages[f"gallery/{script.stem}.md"] = gallery_page(script)
    package = griffe.load("rotate_ewc", search_paths=[str(ROOT)])
    for name in public_names():
        module, _, short = name.rpartition(".")
        imported = f"```python\nfrom {module} import {short}\n```"
        place = documented(package, name)
        pages[f"reference/{name}.md"] = f"# {short}\n\n{imported}\n\n::: {place}\n"
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Give a page of the gallery its title, and lead links to where the site has their files."""
    uri = page.file.src_uri
    origin = next((name for name, made in PAGES.items() if made == uri), f"docs/{uri}")
    if re.fullmatch(r"gallery/(?!index)\w+\.md", uri):
        markdown = f"# {page.title}\n\n{markdown}"

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[2]))
        return (
            match[1]
            + posixpath.relpath(place_of(target, files, config), posixpath.dirname(uri) or ".")
            + match[3]
        )

    parts = FENCE.split(markdown)  # code has brackets too
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in parts)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Take from the site what the theme would take from a network."""
    return output.replace(
        "https://unpkg.com/iframe-worker/shim",
        posixpath.relpath("iframe-worker.js", posixpath.dirname(page.url) or "."),
    )


def place_of(target: str, files: Any, config: Any) -> str:
    """Return where the site has a file of the repository; copy it there if need be."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/") and not target.endswith(".py"):
        return target.removeprefix("docs/")
    if target.startswith("examples/"):
        return f"gallery/{Path(target).stem}.md"
    path = ROOT / target
    if not path.exists():
        return target  # which mkdocs reports
    if path.is_dir():
        raise PluginError(f"there is a link to the folder {target}; expected a file")
    copy = f"source/{target}.txt"  # a browser shows text
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(path)))
    return copy


def gallery_page(script: Path) -> str:
    """Return an example as Markdown, with what it printed and drew."""
    source = script.read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    code = source.split('"""', 2)[2]
    code = re.sub(r"^# ruff: .*\n", "", code, flags=re.MULTILINE)
    parts = (
        [text, f"Run it with `python examples/{script.name}`."] if "Run it" not in text else [text]
    )
    for cell in re.split(r"^# %%\n", code, flags=re.MULTILINE):
        comment = re.match(r"(?:#.*\n)*", cell)[0] if cell is not code else ""
        parts += [re.sub(r"^# ?", "", comment, flags=re.MULTILINE).strip()]
        rest = cell[len(comment) :].strip("\n")
        parts += [f"```python\n{rest}\n```"] if rest else []
    printed = ROOT / "docs" / "gallery" / f"{script.stem}.txt"
    parts += ["## What it prints", f"```text\n{printed.read_text(encoding='utf-8')}```"]
    if (drawn := printed.with_suffix(".png")).exists():
        parts += [f"![What the program draws]({drawn.name})"]
    return "\n\n".join(part for part in parts if part) + "\n"


def public_names() -> Iterator[str]:
    """Yield the dotted names of all that `__all__` lists."""
    for module in MODULES:
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
                names = ast.literal_eval(statement.value)
                yield from (f"{module}.{name}" for name in names if not name.startswith("__"))


def documented(package: Any, name: str) -> str:
    """Return where a public name is defined; an error if it, or a method, has no docstring."""
    owner = package[name.removeprefix("rotate_ewc.")]
    if owner.is_module:  # a function of the same name as the file that it is in
        owner = owner[name.rpartition(".")[2]]
    owner = owner.final_target if owner.is_alias else owner
    # Of dataclasses griffe makes up a constructor; those that are written, ruff looks at.
    members = owner.members.items() if owner.is_class else ()
    methods = [m for key, m in members if not (key.startswith("_") or m.is_alias) and m.is_function]
    if bare := [one.path for one in (owner, *methods) if not one.has_docstring]:
        raise PluginError(f"public, but without a docstring: {', '.join(bare)}")
    return str(owner.path)
