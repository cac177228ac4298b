"""The package's own shape: light imports, one-way dependencies, a working entry point."""

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import scx

PACKAGE = Path(scx.__file__).parent
ROOT = PACKAGE.parent

# What each room may import. Everything points down.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "keys": {"errors", "files"},
    "codecs": {"codecs", "errors", "keys"},
    "kernels": {"errors", "kernels"},
    "devices": {"codecs", "devices", "errors", "keys", "kernels"},
    "plugin": {"codecs", "devices", "errors", "files", "kernels", "keys", "plugin"},
    "sealed": {"errors", "files", "keys", "sealed"},
    "models": {"devices", "errors", "keys", "models", "plugin"},
    "audit": {"audit", "errors", "keys", "plugin"},
    "commands": {"", "audit", "codecs", "devices", "errors", "keys", "kernels", "plugin"},
    "__init__": {"plugin"},
    "__main__": {"commands", "errors", "kernels"},
}
MAY_IMPORT_VLLM = {"__init__", "audit", "commands", "models", "plugin", "sealed"}


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module in ("scx", "tests"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_run_one_way(path):
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "scx":
            target = rest.split(".")[0]
            target = (
                target
                if (PACKAGE / target).exists() or (PACKAGE / f"{target}.py").exists()
                else ""
            )
            assert target in ALLOWED[room(path)], f"{path.name} imports {name}"
        elif top == "vllm":
            assert room(path) in MAY_IMPORT_VLLM, f"{path.name} imports {name}"


TOPS = ("lab", "benchmark_throughput", "benchmark_acc", "scripts", "data", "tests")
FILES = [
    (top, path) for top in ("scx", *TOPS) for path in sorted((ROOT / top).rglob("*.py"))
]


@pytest.mark.parametrize(("top", "path"), FILES, ids=str)
def test_what_is_shipped_needs_no_lab_and_only_tests_need_tests(top, path):
    refused = {"scx": TOPS, "lab": TOPS[1:], "tests": ()}.get(top, ("tests",))
    for name in imported(path):
        assert name.partition(".")[0] not in refused, name
        assert not name.startswith("tests.test_"), name


def test_importing_the_package_loads_neither_torch_nor_vllm():
    code = "import sys, scx; sys.exit(any(m in sys.modules for m in ('torch', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0  # noqa: S603


def test_the_entry_point_is_ours():
    (point,) = [p for p in entry_points(group="vllm.general_plugins") if p.name == "scx"]
    assert point.load() is scx.init_vllm_plugin


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_variables_are_read_in_keys_alone(path):
    if room(path) not in ("keys", "commands"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        names |= {node.name for node in nodes if isinstance(node, ast.alias)}
        assert not names & {"environ", "environb", "getenv", "getenvb"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_nothing_is_guarded_by_assert_or_a_blanket_except(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException")


def test_the_rooms_stand_in_contributing_in_this_order():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Rooms")[2]
    assert re.findall(r"(?m)^\| `(\w+)` \|", text) == list(ALLOWED)
