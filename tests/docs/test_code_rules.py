"""Rules of the code that can be counted: lengths, names at the top, imports of tests, docstrings.

The source is only parsed, never imported.
"""

import ast
import functools
import statistics
from pathlib import Path

import pytest

from tests.helpers import ROOT

FOLDERS = ("mosaic_jax", "experiments", "configs", "tests")
FILE_LINES, FUNCTION_LINES, MEDIAN_LINES, TOP_NAMES = 300, 45, 8, 21
NOT_A_VERB = {
    "What", "Where", "Who", "Which", "Whether", "How", "Of", "The", "A", "An", "So", "See", "Its",
    "It", "If", "In", "On", "For", "From", "To", "Every", "Each", "All", "One", "Some", "No",
    "Nothing", "By", "As", "At", "With",
}  # fmt: skip
"""Words with which no docstring of a function begins."""

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parsed(source: str) -> ast.Module:
    """Return the syntax tree of a module, made once."""
    return ast.parse(source)


def files(*folders: str) -> list[Path]:
    """Return the Python files of folders of the repository."""
    return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


def long_files(paths: list[Path], most: int = FILE_LINES) -> list[str]:
    """Return the files of more than `most` lines, each with its length."""
    lengths = {path: len(path.read_text().splitlines()) for path in paths}
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > most]


def function_lengths(path: Path) -> dict[str, int]:
    """Return the lines of every function, from `def` to its end: `{"file:line name": lines}`."""
    return {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for node in ast.walk(parsed(path.read_text(encoding="utf-8")))
        if isinstance(node, FUNCTIONS)
    }


def all_lengths(paths: list[Path]) -> dict[str, int]:
    """Return the lines of every function of several files."""
    return {name: length for path in paths for name, length in function_lengths(path).items()}


def long_functions(paths: list[Path], most: int = FUNCTION_LINES) -> list[str]:
    """Return the functions of more than `most` lines, each with its length."""
    lengths = all_lengths(paths)
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > most]


def median_length(paths: list[Path]) -> float:
    """Return the median length of the functions, in lines."""
    return statistics.median(all_lengths(paths).values())


def names_at_the_top(package: Path) -> list[str]:
    """Return the modules and folders of a package, without `__init__` and caches."""
    found = (path for path in package.iterdir() if path.is_dir() or path.suffix == ".py")
    return sorted(path.stem for path in found if path.stem not in ("__init__", "__pycache__"))


def imported(path: Path) -> list[tuple[int, str]]:
    """Return every imported name with its line, `from a import b` as `a.b`."""
    found = []
    for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names]
    return found


def imported_tests(paths: list[Path]) -> list[str]:
    """Return the imports of test files and of `conftest`: what they share belongs in helpers."""
    return [
        f"{path}:{line} {name}"
        for path in paths
        for line, name in imported(path)
        if any(part == "conftest" or part.startswith("test_") for part in name.split("."))
        and name.split(".")[0] not in ("mosaic_jax", "experiments")
    ]


def is_property(node: FUNCTIONS) -> bool:
    """Return whether a function is decorated as a property."""
    names = {getattr(each, "attr", getattr(each, "id", "")) for each in node.decorator_list}
    return bool(names & {"property", "cached_property"})


def docstrings_without_verb(paths: list[Path]) -> list[str]:
    """Return the docstrings of functions whose first word is in `NOT_A_VERB`.

    Classes and properties are things: theirs begin with a noun.
    """
    found = []
    for path in paths:
        for node in ast.walk(parsed(path.read_text())):
            if not isinstance(node, FUNCTIONS) or is_property(node):
                continue
            word = next(iter((ast.get_docstring(node) or "").split()), "").rstrip(",.:;'")
            if word in NOT_A_VERB:
                found.append(f"{path}:{node.lineno} {node.name}: {word}")
    return found


def text_without_encoding(paths: list[Path]) -> list[str]:
    """Return the calls that read or write text in the encoding of the locale."""
    found = []
    for path in paths:
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and is_text(node):
                found.append(f"{path}:{node.lineno}")
    return found


def is_text(call: ast.Call) -> bool:
    """Return whether a call opens text, and does not say how it is encoded."""
    name = ast.unparse(call.func)
    names = {each.arg for each in call.keywords}
    if "encoding" in names:
        return False
    if name.endswith((".read_text", ".write_text")):
        return True
    if name == "open" or name.endswith(".open"):
        place = 1 if name == "open" else 0  # a path's `open` takes the mode first
        mode = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
        binary = any("b" in ast.unparse(each) for each in mode)
        return not binary and not name.startswith(("tarfile.", "Image.", "gzip.", "bz2."))
    return name in ("subprocess.run", "subprocess.Popen") and "text" in names


def test_no_file_is_long():
    assert long_files(files(*FOLDERS)) == []


def test_no_function_is_long():
    assert long_functions(files(*FOLDERS)) == []


def test_half_of_the_packages_functions_are_short():
    assert median_length(files("mosaic_jax")) <= MEDIAN_LINES


def test_the_package_shows_few_names():
    found = names_at_the_top(ROOT / "mosaic_jax")
    assert len(found) <= TOP_NAMES, found


def test_no_test_file_imports_another():
    assert imported_tests(files("tests")) == []


def test_text_is_utf8_whatever_the_locale():
    assert text_without_encoding(files("mosaic_jax", "experiments")) == []


def test_docstrings_begin_with_a_verb():
    assert docstrings_without_verb(files("mosaic_jax", "experiments")) == []


@pytest.fixture
def written(tmp_path):
    """Return `written(text)`: the path of a module with that text."""

    def write(text):
        (tmp_path / "module.py").write_text(text)
        return tmp_path / "module.py"

    return write


def test_a_long_file_is_found(written):
    path = written("x = 1\n" * 301)
    assert long_files([path]) == [f"{path}: 301 lines"]
    assert long_files([written("x = 1\n" * 300)]) == []


def test_a_long_function_is_found_from_def_to_end(written):
    body = "    x = 1\n" * 44
    path = written(f"class A:\n    pass\n\n\n@property\ndef f():\n{body}    x = 2\n")
    assert long_functions([path]) == [f"{path}:6 f: 46 lines"]
    assert long_functions([written(f"@property\nasync def f():\n{body}")]) == []


def test_the_median_counts_methods_and_inner_functions(written):
    path = written(
        "class A:\n    def f(self):\n        def g():\n            pass\n\n\ndef h(): ...\n"
    )
    assert all_lengths([path]) == {f"{path}:2 f": 3, f"{path}:3 g": 2, f"{path}:7 h": 1}
    assert median_length([path]) == 2


def test_names_at_the_top_are_modules_and_folders(tmp_path):
    for name in ("__init__.py", "a.py", "py.typed"):
        (tmp_path / name).touch()
    for name in ("__pycache__", "b"):
        (tmp_path / name).mkdir()
    assert names_at_the_top(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "from tests.conftest import x",
        "import conftest",
        "from tests.data.test_idx import x",
        "from tests.data import test_idx",
        "def f():\n    from .test_idx import x",
    ],
)
def test_an_import_of_a_test_is_found(written, text):
    assert len(imported_tests([written(text)])) == 1
    allowed = "import pytest\nfrom tests.helpers import ROOT\nfrom mosaic_jax import test_of_all\n"
    assert imported_tests([written(allowed)]) == []


def test_a_docstring_without_verb_is_found_with_its_line(written):
    path = written('"""The module."""\n\n\ndef f():\n    """What it is."""\n')
    assert docstrings_without_verb([path]) == [f"{path}:4 f: What"]
    method = 'class A:\n    def f(self):\n        """Of, as."""\n'
    assert docstrings_without_verb([written(method)]) == [f"{path}:2 f: Of"]
    thing = 'class A:\n    """The A."""\n\n    @property\n    def b(self):\n        """The b."""\n'
    assert docstrings_without_verb([written(thing)]) == []
    assert docstrings_without_verb([written('def f():\n    """Return the loss."""\n')]) == []


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open('a')", True),
        ("path.open('r+b')", False),
        ("open(path)", True),
        ("open('table.md')", True),
        ("path.open(mode='rb')", False),
        ("gzip.open(path)", False),
        ("subprocess.run(words, text=True)", True),
        ("subprocess.run(words)", False),
    ],
)
def test_text_in_the_encoding_of_the_locale_is_found(written, text, is_found):
    assert bool(text_without_encoding([written(text)])) == is_found
