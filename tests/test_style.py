"""What a reader relies on: one order of imports, options that are read and explained, short functions
and lines, a README whose commands, options and line counts are those of the scripts; and how the suite runs."""
import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import side_by_side

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["prepare_data", "train_vae", "caption", "train_dit", "sample"]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("tests/*.py")])
# options of torchrun, and of what is measured beside peers (tests/peers.py, kernels/bench.py)
OTHERS = {"--nproc_per_node", "--dims", "--footage", "--minutes", "--repeats"}


class Parsed(Exception):
    pass


@pytest.fixture(scope="module")
def parsers():
    """{stage: its argument parser}"""
    def stop(self, *_):
        raise Parsed(self)

    result, whole = {}, argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = stop
    try:
        for stage in STAGES:
            with pytest.raises(Parsed) as caught:
                importlib.import_module(stage).main(["NAME"])
            result[stage] = caught.value.args[0]
    finally:
        argparse.ArgumentParser.parse_args = whole
    return result


def names_read(tree):
    """Every attribute's name and every string that stands alone, as in getattr(args, "name")."""
    return ({node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            | {node.value for node in ast.walk(tree)
               if isinstance(node, ast.Constant) and isinstance(node.value, str)})


def test_every_option_is_read_and_explained(parsers):
    read = set().union(*(names_read(ast.parse((ROOT / f"{stage}.py").read_text()))
                         for stage in STAGES))
    for stage, parser in parsers.items():
        for action in parser._actions:
            assert action.help, f"{stage}: {action.dest} has no help"
            bound = re.match(r"(min|max)_", action.dest)        # of a score: read by its prefix
            assert action.dest in read | {"help"} or bound, f"{stage}: {action.dest} is not read"


@pytest.mark.parametrize("stage", STAGES + ["kernels"])
def test_imports_run_one_way(stage):
    files = [ROOT / f"{stage}.py"] if stage in STAGES else ROOT.glob("kernels/*.py")
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        later = STAGES[STAGES.index(stage):] if stage in STAGES else STAGES
        assert not {name.split(".")[0] for name in names} & {*later, "tests"}
        assert stage != "prepare_data" or "torch" not in names         # its workers stay small


def test_functions_and_lines_are_short():
    for file in FILES:
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 72, f"{file.name}: {node.name} is long"
        if "tests" not in file.parts:
            wide = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
            assert not wide, f"{file.name}: lines {wide} are wide"


def commands(text):
    """[(stage, its options)] of the command lines in a text."""
    return [(stage, set(re.findall(r"(?<!\S)(--[a-z_]+)", options))) for stage, options in
            re.findall(r"(?:python|--) (\w+)\.py ([^`\n#&]*)", text) if stage in STAGES]


def test_readme_and_docstrings_name_options_that_exist(parsers):
    readme, docs = (ROOT / "README.md").read_text(), {}
    for stage in STAGES:
        docs[stage] = ast.get_docstring(ast.parse((ROOT / f"{stage}.py").read_text()))
    for where, text in (("README.md", readme), *docs.items()):
        for stage, options in commands(text):
            unknown = options - set(parsers[stage]._option_string_actions) - OTHERS
            assert not unknown, f"{where}: {stage}.py has no {unknown}"
    assert len(commands(readme)) > 30
    known = set().union(*(parser._option_string_actions for parser in parsers.values()))
    unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z_]+", readme)) - known - OTHERS
    assert not {name for name in unknown if not name.endswith("_")}, unknown  # --min_NAME


def test_readme_has_the_scripts_lines_about():
    """A script's own lines, those above the ruled line of what concerns published files, and all."""
    table = re.findall(r"^\| `(\S+?)(?:\.py|/)` \| (?:(\d+) of )?(\d+) \|",
                       (ROOT / "README.md").read_text(), re.M)
    assert {name for name, *_ in table} == {*STAGES, "kernels"}
    for name, own, lines in table:
        files = [ROOT / f"{name}.py"] if name in STAGES else ROOT.glob("kernels/*.py")
        actual = [line for file in files for line in file.read_text().splitlines()]
        assert abs(int(lines) - len(actual)) <= 0.03 * len(actual), f"{name}: {len(actual)} lines"
        rules = [i for i, line in enumerate(actual) if line.startswith("# == ")]
        assert len(rules) == (name in STAGES), name
        assert not rules or abs(int(own) - rules[0]) <= 0.03 * rules[0], f"{name}: {rules[0]} own"


def test_readme_is_short_and_its_places_exist():
    """Three screens; and who forks finds each thing in the one or two places that it names."""
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 14_000 and len(text.splitlines()) <= 200
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", text[text.index("## Where would I"):], re.M)[1:]
    assert len(rows) == 12
    for question, answer in rows:
        names = 0
        for stage, listed in re.findall(r"`([\w/]+)\.py` ((?:`\w+`[^`]*)+)", answer):
            tree = ast.parse((ROOT / f"{stage}.py").read_text())
            defined = {getattr(node, "name", None) for node in tree.body} | {
                target.id for node in tree.body if isinstance(node, ast.Assign)
                for target in node.targets if isinstance(target, ast.Name)}
            named = set(re.findall(r"`(\w+)`", listed))
            assert named <= defined, f"README, {question}: {stage}.py has no {named - defined}"
            names += len(named)
        assert 1 <= names <= 4, question


def test_two_processes_share_the_suite(tmp_path):
    """Each test runs once, in one of two processes; what fails or is skipped in either is told."""
    for name in "abcd":
        (tmp_path / f"test_{name}.py").write_text(
            "import os, pathlib, time, pytest\n"
            "@pytest.mark.parametrize('i', range(3))\n"
            "def test_it(i):\n"
            f"    with open('{tmp_path}/pids', 'a') as file: print(os.getpid(), file=file)\n"
            "    end = time.monotonic() + 60                 # until the other process is there\n"
            f"    while len({{*open('{tmp_path}/pids')}}) < 2 and time.monotonic() < end:\n"
            "        time.sleep(0.1)\n"
            f"    if i == 2 and '{name}' in 'ad': pytest.skip('why not')\n"
            f"    assert (i, '{name}') not in [(1, 'a'), (1, 'd')]\n")
    env = {key: value for key, value in os.environ.items() if key != side_by_side.PLACE}
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "side_by_side", "-rs", "."],
                          cwd=tmp_path, env=dict(env, PYTHONPATH=str(ROOT / "tests")), text=True,
                          capture_output=True)
    assert done.returncode == 1 and "2 failed, 8 passed, 2 skipped" in done.stdout, done.stdout
    assert done.stdout.count("SKIPPED [1]") == 2 and "assert (1, 'a')" in done.stdout
    counts = Counter((tmp_path / "pids").read_text().split()).values()
    assert len(counts) == 2 and sum(counts) == 12 and not any(n % 3 for n in counts)
