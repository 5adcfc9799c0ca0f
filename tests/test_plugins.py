"""Plug-ins load by file or module, and a mistake in one is told in a line."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from judges.errors import UserError
from judges.interface import Score
from judges.plugins import is_plugin, load_plugin, nearest, resolve_plugin_path


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


def error_of(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        load_plugin(spec, key="judge.name")
    message = str(caught.value)
    assert message.startswith(f"judge.name={spec}: ")
    assert "\n" not in message
    return message


def test_a_colon_makes_a_plugin():
    assert is_plugin("my.py:f")
    assert is_plugin("module:f")
    assert not is_plugin("sentiment")
    assert not is_plugin("file.py")


def test_function_and_class_from_a_file(tmp_path):
    path = write(
        tmp_path / "mine.py",
        """
        from __future__ import annotations
        from dataclasses import dataclass

        def double(x):
            return 2 * x

        @dataclass(slots=True)
        class Point:
            x: int
        """,
    )
    assert load_plugin(f"{path}:double", key="k")(21) == 42
    assert load_plugin(f"{path}:Point", key="k")(x=3).x == 3


def test_function_from_an_installed_module():
    assert load_plugin("json:dumps", key="k") is json.dumps


def test_relative_file_is_relative_to_the_cwd(tmp_path, monkeypatch):
    write(tmp_path / "here.py", "def f():\n    return 'here'\n")
    monkeypatch.chdir(tmp_path)
    assert load_plugin("here.py:f", key="k")() == "here"


def test_a_file_runs_once_and_files_of_one_name_are_kept_apart(tmp_path):
    one = write(tmp_path / "a" / "judge.py", "runs = []\ndef f():\n    return 'a'\n")
    two = write(tmp_path / "b" / "judge.py", "def f():\n    return 'b'\n")
    assert load_plugin(f"{one}:f", key="k") is load_plugin(f"{one}:f", key="k")
    assert load_plugin(f"{one}:f", key="k")() == "a"
    assert load_plugin(f"{two}:f", key="k")() == "b"


def test_a_users_judges_folder_does_not_come_before_ours(tmp_path):
    write(tmp_path / "judges" / "__init__.py", "raise RuntimeError('theirs')")
    path = write(
        tmp_path / "mine.py",
        """
        from judges.interface import Score

        def f():
            return Score
        """,
    )
    before = list(sys.path)
    assert load_plugin(f"{path}:f", key="k")() is Score
    assert sys.path == before


def test_another_process_loads_it_by_its_spec(tmp_path):
    path = write(tmp_path / "mine.py", "def f():\n    return 'loaded elsewhere'\n")
    program = (
        f"from judges.plugins import load_plugin; print(load_plugin({f'{path}:f'!r}, key='k')())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "loaded elsewhere\n"


@pytest.mark.parametrize("spec", ["sentiment", "file.py:", ":f"])
def test_what_is_no_spec(spec):
    assert "path/to/file.py:name or installed.module:name" in error_of(spec)


def test_missing_file(tmp_path):
    assert f"no file {tmp_path}/no.py" in error_of(f"{tmp_path}/no.py:f")


def test_a_file_that_is_not_python(tmp_path):
    path = write(tmp_path / "mine.txt", "def f(): ...")
    assert "must end in .py" in error_of(f"{path}:f")


def test_missing_name_tells_the_nearest(tmp_path):
    path = write(tmp_path / "mine.py", "def score(): ...\ndef other(): ...\nscored = 3\n")
    assert "has no skore (did you mean score?)" in error_of(f"{path}:skore")
    assert "scored is a int" in error_of(f"{path}:scored")


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("polarty", ["sentiment", "polarity"]) == " (did you mean polarity?)"
    assert nearest("xyz", ["sentiment", "polarity"]) == ""


def test_failed_import_tells_type_message_and_the_users_line(tmp_path):
    path = write(
        tmp_path / "mine.py",
        """\
        import json
        def load():
            return json.loads("{\\n")

        threshold = load()
        """,
    )
    message = error_of(f"{path}:f")
    assert f"at line 3 of {path}: JSONDecodeError: Expecting property name" in message


def test_syntax_error_tells_the_line(tmp_path):
    path = write(tmp_path / "mine.py", "x = 1\ny = 2\ndef f(:\n")
    assert f"at line 3 of {path}: SyntaxError: " in error_of(f"{path}:f")


def test_missing_import_tells_that_neighbours_are_not_importable(tmp_path):
    write(tmp_path / "my_neighbour.py", "")
    path = write(tmp_path / "mine.py", "import my_neighbour\n")
    message = error_of(f"{path}:f")
    assert f"at line 1 of {path}: ModuleNotFoundError: No module named 'my_neighbour'" in message
    assert "own folder is not on the import path" in message


def test_a_mended_file_loads(tmp_path):
    path = write(tmp_path / "mine.py", "raise ValueError('not yet')")
    error_of(f"{path}:f")
    write(path, "def f():\n    return 1\n")
    assert load_plugin(f"{path}:f", key="k")() == 1


def test_a_module_that_is_not_installed():
    assert "no module named not_installed_here is installed" in error_of("not_installed_here.x:f")


def test_a_package_whose_import_fails(tmp_path, monkeypatch):
    package = write(tmp_path / "broken_package" / "__init__.py", "x = 1\nx / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = error_of("broken_package.judges:f")
    assert f"at line 2 of {package}: ZeroDivisionError: division by zero" in message


def test_resolve_tries_the_configs_folder_then_the_cwd(tmp_path, monkeypatch):
    config, cwd = tmp_path / "config", tmp_path / "cwd"
    both = write(config / "both.py", "")
    write(cwd / "both.py", "")
    only_cwd = write(cwd / "sub" / "mine.py", "")
    monkeypatch.chdir(cwd)
    assert resolve_plugin_path("both.py:f", config) == f"{both}:f"
    assert resolve_plugin_path("sub/mine.py:f", config) == f"{only_cwd}:f"
    assert resolve_plugin_path("../config/both.py:f", config) == f"{both}:f"
    assert resolve_plugin_path(f"{only_cwd}:f", config) == f"{only_cwd}:f"


def test_resolve_leaves_modules_and_built_ins_alone(tmp_path):
    assert resolve_plugin_path("package.module:f", tmp_path) == "package.module:f"
    assert resolve_plugin_path("sentiment", tmp_path) == "sentiment"


def test_resolve_tells_both_places(tmp_path, monkeypatch):
    config, cwd = tmp_path / "config", tmp_path / "cwd"
    config.mkdir()
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    with pytest.raises(UserError, match=r"^judge\.name=no\.py:f: no file no\.py in ") as caught:
        resolve_plugin_path("no.py:f", config, key="judge.name")
    assert f"in {config} or {cwd}: " in str(caught.value)
