"""README and docs are true: every command, path, config and setting in them resolves."""

import contextlib
import importlib
import importlib.util
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest

from mosaic_jax import flags
from mosaic_jax import settings as reader
from mosaic_jax.data import sources
from mosaic_jax.methods import METHODS
from mosaic_jax.models import CLASSIFIERS
from mosaic_jax.types import UserError
from tests.docs import commands
from tests.docs.commands import PACKAGE, PAGES
from tests.helpers import CACHE_SETTINGS, ROOT

COMMANDS, BY_MODULE = commands.found(), commands.by_module()
OTHER_PROGRAMS = {"pytest", "ruff", "mypy", "lint-imports", "git", "cd", "apt-get", "ls"}


def config_file(words: list[str]) -> dict:
    """Return the settings that a command's --config and overrides ask for, checked."""
    values = dict(word[2:].split("=", 1) for word in words if word.startswith("--config"))
    path, _, options = values.pop("config").partition(":")
    settings = reader.get_config(path, options)
    for name, value in values.items():
        dotted = name.removeprefix("config.")
        current = settings.to_dict()
        for part in dotted.split("."):
            current = current[part]
        is_text = current is None or isinstance(current, str)
        settings.update_from_flattened_dict({dotted: value if is_text else eval(value)})
    return settings.to_dict()


def check_run(words: list[str]) -> None:
    """Fail on a command of the main program with a wrong flag, config or setting."""
    own = [word for word in words if word.startswith("--") and not word.startswith("--config")]
    for flag in (word[2:].partition("=")[0] for word in own):
        is_flag = flag in (*flags.NAMES, "help", "flagfile")
        assert is_flag, flag
    if "--help" not in words:
        reader.from_config_dict(config_file(words))


def check(words: list[str]) -> None:
    """Fail on a command that could not run from a clean clone."""
    words = commands.without_environment(words)
    module, program = commands.module_of(words), Path(words[0]).name
    if module == "mosaic_jax.main":
        check_run(words[3:])
    elif module:
        assert importlib.util.find_spec(module), module
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        declared = (ROOT / "pyproject.toml").read_text()
        for extra in ",".join(extras).split(",") if extras else []:
            assert re.search(rf"^{extra} = \[", declared, flags=re.M), words
    else:
        assert program in OTHER_PROGRAMS, words


def check_arguments(usage: str, words: list[str]) -> None:
    """Fail on a flag that a usage text lacks, and on a config or setting that there is none of."""
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{flag}(?![\w-])", usage), flag
    given = " ".join(words)
    for config in re.findall(r"--config[ =](\S+)", given):
        name, _, options = config.partition(":")
        assert reader.get_config(name, options)
    for changes in re.findall(r"--set((?: \w[\w.]*=\S+)+)", given):
        for name in (change.partition("=")[0] for change in changes.split()):
            assert name in reader.names(), name


@pytest.mark.parametrize("source", COMMANDS)
def test_every_command_could_run(source):
    for words in COMMANDS[source]:
        check(words)


@pytest.mark.parametrize("module", BY_MODULE)
def test_every_command_has_the_flags_of_its_module(module, capsys, monkeypatch):
    if module == "experiments.speed.compare_pytorch":
        pytest.importorskip("torch", reason="the comparison needs the extra `torch`")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    usage, described, _ = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith("usage: ")
    assert described
    for words in BY_MODULE[module]:
        check_arguments(usage, words)


def is_in_package(package: str, name: str) -> bool:
    """Return whether a package or module of `mosaic_jax` has a module, class or function."""
    path = PACKAGE / package
    if (path / f"{name}.py").exists() or (path / name).is_dir():
        return True
    is_there = path.is_dir() or path.with_suffix(".py").exists()
    return is_there and hasattr(importlib.import_module(f"mosaic_jax.{package}"), name)


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
            # `parallel`, `data` and `run` are sections and packages.
            known = f"{name[1]}.{name[2]}" in settings
            assert known or is_in_package(name[1], name[2]), (page.name, code)


def exists(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(name):
            return True
    with contextlib.suppress(ImportError, AttributeError):
        pkgutil.resolve_name(name)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_exists(page):
    """The changelog names those that were, too."""
    names = set(re.findall(r"\b(?:experiments|mosaic_jax)(?:\.\w+)+", page.read_text()))
    assert page.name == "CHANGELOG.md" or [name for name in names if not exists(name)] == []


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
        check(commands.in_blocks(wrong)[0])
    with pytest.raises(AssertionError):
        check(["frobnicate", "--now"])


def test_commands_are_found_wherever_they_stand():
    page = "```sh\nA=1 python -m a.b \\\n  --c d && ls  # e\n```\nType `python -m f\n--g 'h i'`."
    assert commands.in_blocks(page) == [["A=1", "python", "-m", "a.b", "--c", "d"], ["ls"]]
    assert commands.in_line(page) == [["python", "-m", "f", "--g", "h i"]]
    source = (
        '"""Do.\n\n    python -m a --b c \\\\\n        --d\n    other\n\nOr `python -m e`."""\n'
    )
    assert commands.in_docstring(source) == [
        ["python", "-m", "a", "--b", "c", "--d"],
        ["python", "-m", "e"],
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--colour"],
        ["--seed", "1"],
        ["--config", "digts"],
        ["--config=digits:sevre"],
        ["--set", "model.width=8", "model.wdith=8"],
    ],
)
def test_the_check_of_arguments_can_fail(words):
    usage = "usage: program [--config CONFIG] [--seeds SEEDS] [--set [NAME=VALUE ...]]"
    check_arguments(usage, ["--config=digits:severe", "--seeds", "1", "--set", "model.width=8"])
    with pytest.raises((AssertionError, UserError)):
        check_arguments(usage, words)


def test_the_check_of_modules_can_fail():
    assert all(map(exists, ("mosaic_jax.sweep", "mosaic_jax.settings.make", "experiments.claims")))
    missing = ("mosaic_jax.swep", "mosaic_jax.settings.mkae", "experiments.swep.engine")
    assert not any(map(exists, missing))


def test_the_check_of_the_main_programs_flags_can_fail():
    check_run(["--config=digits", "--workdir=runs/digits", "--plan"])
    with pytest.raises((AssertionError, KeyError)):
        check_run(["--config=digits", "--workdri=runs/digits"])
    with pytest.raises(UserError, match="did you mean 'digits'"):
        check_run(["--config=digts"])
