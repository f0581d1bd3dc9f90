"""README and docs are true: every command, path, config and setting in them resolves."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mosaic_jax import settings as reader
from mosaic_jax.data import sources
from mosaic_jax.methods import METHODS
from mosaic_jax.models import CLASSIFIERS
from tests.helpers import CACHE_SETTINGS, ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "mosaic_jax"


def commands(text: str) -> list[list[str]]:
    """Every command of the fenced shell blocks, joined lines and `&&` chains taken apart."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("#")[0].split("&&")]
    return [words for words in (shlex.split(part) for part in parts) if words]


def config_file(words: list[str]) -> dict:
    """The settings that a command's --config and overrides ask for, checked."""
    values = dict(word[2:].split("=", 1) for word in words if word.startswith("--config"))
    path, _, options = values.pop("config").partition(":")
    spec = importlib.util.spec_from_file_location("named", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config(options)
    for name, value in values.items():
        dotted = name.removeprefix("config.")
        current = settings.to_dict()
        for part in dotted.split("."):
            current = current[part]
        is_text = current is None or isinstance(current, str)
        settings.update_from_flattened_dict({dotted: value if is_text else eval(value)})
    return settings.to_dict()


def check(words: list[str]) -> None:
    """Fail on a command that could not run from a clean clone."""
    while re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    program = Path(words[0]).name
    if program.startswith("python") and words[1:2] == ["-m"]:
        module = words[2]
        if module == "venv":
            return
        assert importlib.util.find_spec(module), module
        if module == "mosaic_jax.main" and "--help" not in words:
            reader.from_config_dict(config_file(words))
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(words))
        declared = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", declared, flags=re.M) for extra in extras), words
    else:
        assert program in {
            "pytest",
            "ruff",
            "mypy",
            "lint-imports",
            "git",
            "cd",
            "apt-get",
            "ls",
        }, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_could_run(page):
    for words in commands(page.read_text()):
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_setting_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    settings = set(reader.names())
    sections = {name.split(".")[0] for name in settings if "." in name}
    for code in re.findall(r"`([^`\n]+)`", text):
        for path in re.findall(r"[\w/]+\.(?:py|md|toml)\b", code):
            assert any((base / path).exists() for base in (ROOT, PACKAGE)), (page.name, path)
        name = re.fullmatch(r"(\w+)\.(\w+)( = .*)?", code)
        if name and name[1] in sections and name[2] not in {"py", "md"}:
            known = f"{name[1]}.{name[2]}" in settings
            module = PACKAGE / f"{name[1]}.py"  # `parallel` is a section and a module
            source = module.read_text() if module.exists() else ""
            assert known or f"def {name[2]}(" in source, (page.name, code)


def test_every_name_of_the_method_is_in_the_file_it_is_said_to_be_in():
    text = (ROOT / "docs/method.md").read_text()
    for path, names in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", text):
        source = (PACKAGE / path).read_text()
        for name in names.split(", "):
            last = name.split(".")[-1]
            assert re.search(rf"(def|class) {last}\b|^{last}\b", source, re.M), (path, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_guides_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """In a directory of its own; what it registers goes away with the test."""
    for registry in (sources.SOURCES, METHODS, CLASSIFIERS):
        for name in ("stripes", "small_logits", "perceptron"):
            monkeypatch.setitem(registry, name, None)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.S)
    names: dict = {"__name__": "guide"}
    exec(compile(code, "docs/guide.md", "exec"), names)
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert set(found) == {"student", "teacher", "small_logits"}
    assert float(found["teacher"]) > 0.6
    assert float(found["small_logits"]) > 0.6
    assert names["pictures"].shape == (4, 16, 16, 1)
    assert (tmp_path / "runs/student.npz").exists()


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    """On a run that other tests compile, too: table, figures and the exported student are made."""
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    for name, value in CACHE_SETTINGS.items():
        monkeypatch.setenv(name.upper(), str(value))
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(ROOT / "docs/tour.ipynb", 4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        cell.source = cell.source.replace("configs/digits.py:severe", "configs/base.py:small")
    metadata = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=metadata).execute()
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    text = "".join(each.get("text", "") for each in outputs)
    assert "student after fine-tuning" in text
    assert sum("image/png" in each.get("data", {}) for each in outputs) == 2
    assert (tmp_path / "runs/student.stablehlo").stat().st_size > 1000


def test_the_check_of_commands_can_fail():
    wrong = "```bash\npython -m mosaic_jax.main --config=configs/digits.py --config.seeed=1\n```"
    with pytest.raises((KeyError, AttributeError)):
        check(commands(wrong)[0])
    with pytest.raises(AssertionError):
        check(["frobnicate", "--now"])
