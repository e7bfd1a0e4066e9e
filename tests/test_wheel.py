"""The wheel, installed where there is no checkout, does the main job."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_searches_without_the_checkout(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    # what the wheel needs is taken from this environment, the package itself from the wheel alone
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
    command = [tmp_path / "env" / "bin" / "allocator", "search", "--json", "--workers", "0"]
    small = ["evolution.generations=1", "evolution.tokens=[512]", "evolution.survivors=[1]"]
    settings = [f"--set=search.{key}" for key in small]
    settings += [f"--set=tokens.{split}=2048" for split in ("calibration", "selection", "test")]
    done = subprocess.run([*command, *settings], cwd=tmp_path, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert result["measured"]["searched"]["params"] <= result["budget"]["params"]["limit"]
    where = subprocess.run(
        [python, "-c", "import allocator; print(allocator.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(site))
