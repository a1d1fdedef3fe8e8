"""Every code block of the documentation runs, and every command in it exists."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import scfa_core
from scfa_core.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "guides").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LIBRARIES = {
    "torch": "needs the extra torch",
    "transformers": "needs the extra hf",
    "jax": "JAX is no extra of this package; pip install jax",
}

if not (ROOT / "README.md").exists():
    pytest.skip("the tests run outside a source tree", allow_module_level=True)


def blocks(page, *languages):
    """(line, code) of each block of a page."""
    text = page.read_text()
    return [
        (text[: found.start(2)].count("\n") + 1, found.group(2))
        for found in BLOCK.finditer(text)
        if found.group(1) in languages
    ]


def commands(page):
    """Each shell command of a page: those in console blocks and those quoted in the text."""
    lines = [line for _, code in blocks(page, "console") for line in code.splitlines()]
    lines += re.findall(r"`((?:make|scfa) [^`]+)`", BLOCK.sub("", page.read_text()))
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run(page, monkeypatch, tmp_path):
    """Blocks of a page run in order and share their names, as a reader would run them."""
    monkeypatch.delenv("SCFA_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "documentation"}
    for line, code in blocks(page, "python"):
        for library, how in LIBRARIES.items():
            if re.search(rf"^(import|from) {library}\b", code, re.MULTILINE):
                pytest.importorskip(library, reason=how)
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def test_no_block_is_left_out():
    for page in PAGES:
        languages = {found.group(1) for found in BLOCK.finditer(page.read_text())}
        assert languages <= {"python", "console", "text"}, page


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in PAGES:
        for command in commands(page):
            if command[0] == "make":
                assert command[1] in targets, f"{name_of(page)}: {command}"


def test_scfa_commands_are_understood():
    parsed = 0
    for page in PAGES:
        for command in commands(page):
            if command[0] == "scfa":
                build_parser().parse_args(command[1:])
                parsed += 1
    assert parsed >= 4


def test_readme_starts_with_the_two_commands():
    (_, first), *_ = blocks(ROOT / "README.md", "console")
    assert [shlex.split(line, comments=True) for line in first.splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_pictures_have_a_row_for_every_pattern():
    text = (ROOT / "README.md").read_text()
    for name in ("Causal", "HashSparse", "QKSparse", "Documents", "SlidingWindow", "KeyRanges"):
        assert re.search(rf"^\| !\[\]\(docs/img/\w+\.png\) \| `{name}\(", text, re.MULTILINE)


def test_pictures_of_pages_exist():
    for page in (ROOT / "docs").rglob("*.md"):
        for picture in re.findall(r'src(?:set)?="([^"]+)"', page.read_text()):
            assert (page.parent / picture).exists(), f"{name_of(page)}: {picture}"


def test_the_gallery_shows_what_its_code_makes():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "make_gallery.py")
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    entries = gallery.entries()
    assert len(entries) == len(blocks(gallery.PAGE, "python")) - 1 >= 20  # the first one imports
    for entry in entries:
        for theme in gallery.THEMES:
            picture = entry.path.with_name(f"{entry.path.name}-{theme}.png")
            assert entry.digest().encode() in picture.read_bytes(), f"{picture}: run make images"


def test_every_page_is_in_the_navigation():
    """The site builds strictly, `make docs`; this says it in the tests too."""
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def documented():
    """Whatever the pages of the reference name."""
    pages = "".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    return set(re.findall(r"^::: (scfa_core[\w.]*)$", pages, re.MULTILINE))


def test_every_public_name_is_in_the_reference():
    named = {name.rpartition(".")[2] for name in documented()}
    assert set(scfa_core.__all__) - {"__version__"} <= named


PUBLIC_MODULES = {  # and what each needs
    "compat": "torch",
    "decoding": None,
    "distributed": "torch",
    "dropping": "torch",
    "hashing": None,
    "hf": "transformers",
    "merging": None,
    "nn": "torch",
    "torch_flash": "torch",
    "torch_flops": "torch",
}


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_module_is_in_the_reference_whole(module):
    """The site leaves out what has no docstring, and says nothing."""
    needs = PUBLIC_MODULES[module]
    if needs is not None:
        pytest.importorskip(needs, reason=f"{module} needs {needs}")
    if module == "distributed" and not sys.modules["torch"].distributed.is_available():
        pytest.skip("this torch has no distributed package")
    found = importlib.import_module(f"scfa_core.{module}")
    assert f"scfa_core.{module}" in documented()
    for name in found.__all__:
        assert (getattr(found, name).__doc__ or "").strip(), f"{module}.{name}"


def test_examples_are_named_and_say_how_to_run_them():
    text = "".join(p.read_text() for p in PAGES)
    for script in (ROOT / "examples").glob("*.py"):
        assert f"examples/{script.name}" in text, script
        assert f"examples/{script.name}" in script.read_text(), script


def test_the_example_on_arrays_learns(monkeypatch, capsys):
    script = ROOT / "examples" / "train_arrays.py"
    spec = importlib.util.spec_from_file_location("train_arrays", script)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "array_module", lambda: np)
    monkeypatch.setattr(sys, "argv", [script.name])
    example.main()
    first, last = (
        float(re.search(r"loss (\S+)", x).group(1)) for x in capsys.readouterr().out.splitlines()
    )
    assert last < first / 20
