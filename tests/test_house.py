"""Rules of the house that are read off the source: what it must not call, how long it may be, what verbs say."""

import ast
import configparser
import contextlib
import dataclasses
import importlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tools import cli
from tools.leaves import Leaf, options_leaves

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("txfm_data", "shards", "txfm_model", "txfm_eval", "tools")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

UNPICKLING = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EVALUATING = {"eval", "exec", "compile", "__import__"}
SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
LOADING = {"torch.load", "pd.read_pickle", "pandas.read_pickle", "yaml.unsafe_load", "yaml.full_load"}
GLOBAL_RANDOM_STATE = {"np.random.seed", "numpy.random.seed", "random.seed"}
FORBIDDEN_CALLS = EVALUATING | SHELL | LOADING | GLOBAL_RANDOM_STATE
FORBIDDEN_IF_TRUE = {"shell", "allow_pickle"}

MODULE_LINES, FUNCTION_LINES = 500, 60


def dotted(node: ast.expr) -> str:
    """Return a name as written, or nothing for what is none."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def offences(source: str) -> Iterator[str]:
    """Yield what a source must not do, each with its line."""
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            if module.split(".")[0] in UNPICKLING:
                yield f"line {node.lineno} imports {module}"
        if not isinstance(node, ast.Call):
            continue
        if dotted(node.func) in FORBIDDEN_CALLS:
            yield f"line {node.lineno} calls {dotted(node.func)}"
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in FORBIDDEN_IF_TRUE and not is_false:
                yield f"line {node.lineno} passes {keyword.arg}"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "x = eval(y)",
        "def f():\n    import os\n    os.system('x')",
        "subprocess.run('x', shell=True)",
        "subprocess.run('x', shell=flag)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path, weights_only=True)",
        "np.random.seed(0)",
    ],
)
def test_the_rules_find_what_they_forbid(source: str) -> None:
    assert len(list(offences(source))) == 1


def test_the_rules_leave_the_rest() -> None:
    source = "re.compile('x')\ntorch.compile(m)\nmodel.eval()\nnp.load(p, allow_pickle=False)\nf(shell=None)"
    assert list(offences(source)) == []


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_modules_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MODULE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines besides its docstring"


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_only_verbs_print(path: Path) -> None:
    if path.parent.name == "tools":
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if dotted(node.func) == "print"] == []


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_line_of_a_verb_is_the_first_of_its_docstring(verb: str) -> None:
    tree = ast.parse((ROOT / "tools" / f"{verb}.py").read_text(encoding="utf-8"))
    assert cli.VERBS[verb] == (ast.get_docstring(tree) or "").splitlines()[0]
    assert cli.VERBS[verb].endswith(".")


def options_types(module: ModuleType) -> list[type]:
    """Return the options dataclasses that a verb's module defines, or takes from the configuration of training."""
    if module.__name__ == "tools.train":
        from txfm_model.config import TrainConfig

        return [TrainConfig]
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    ]


def leaves_of(verb: str) -> list[Leaf]:
    types = options_types(importlib.import_module(f"tools.{verb}"))
    assert types, f"tools/{verb}.py has no options"
    return [leaf for node in types for leaf in options_leaves(node)]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_says_what_it_is(verb: str) -> None:
    assert [leaf.key for leaf in leaves_of(verb) if len(leaf.help) < 8] == []


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_is_in_the_help(verb: str) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main([verb, "--help"]) == 0
        for kind in [
            line.split()[0] for line in shown.getvalue().partition("kinds:\n")[2].splitlines() if line[:2] == "  "
        ]:
            assert cli.main([verb, kind, "--help"]) == 0
    text = shown.getvalue()
    missing = [leaf.flag for leaf in leaves_of(verb) if leaf.flag not in text and f" {leaf.metavar}" not in text]
    assert missing == []


def test_presets_are_read_whole() -> None:
    from tools.options import read_configs
    from txfm_model.config import TrainConfig, config_from_dict

    presets = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(presets) >= 5
    for path in presets:
        tree = read_configs([f"--config={path}"], TrainConfig)
        if not {"steps", "epochs"} & tree.get("loop", {}).keys():
            tree["loop"] = {**tree.get("loop", {}), "steps": 1}
        config_from_dict(TrainConfig, {"shards": "s", "out": "o", **tree})


def test_the_versions_that_tests_run_with_are_allowed_and_none_is_left_open() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = "\n".join([config["options"]["install_requires"], *extras.values()]).splitlines()
    asked = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    exact = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    for requirement in asked:
        version = exact[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"
