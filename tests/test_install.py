"""What an environment has in which the package was installed, without a checkout beside it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def test_a_wheel_brings_the_recipes_and_the_world_of_the_demo(tmp_path):
    source, environment = tmp_path / "source", tmp_path / "environment"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("align", "pipelines", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(source)
    venv.create(environment, symlinks=True)
    python = str(environment / "bin" / "python")
    subprocess.run([*PIP, "--python", python, "install", "--no-index", "--no-deps", str(wheel)], check=True)

    others = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}  # an editable install there is not followed
    plan = [python, "-m", "align", "run", "demo", "--plan", "--out", "run"]
    done = subprocess.run(plan, cwd=tmp_path, env=others, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].split() == ["run", "world", "never", "ran"]
    found = [python, "-c", "import align.recipe; print(align.recipe.find_recipe('demo'))"]
    recipe = Path(subprocess.run(found, cwd=tmp_path, env=others, capture_output=True, text=True, check=True).stdout.strip())
    assert recipe.is_relative_to(environment.resolve())
    assert (recipe.parent.parent / "data" / "world.py").is_file()
    assert list(environment.glob("lib/*/site-packages/align/runner/accelerate.yaml")), "every launch reads it"
