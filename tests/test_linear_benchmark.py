"""The benchmark of the recursive engines runs, is exact, and reports what it ran on."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "recursive.py"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of this installation")
def test_small_run():
    spec = importlib.util.spec_from_file_location("benchmark_recursive", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = script.parse(["--d", "48", "--m", "8", "--n", "4", "--batches", "30", "--repeats", "2",
                         "--engines", "inverse", "cholesky", "keys"])  # fmt: skip
    report = script.run(args)
    for engine in report["engines"].values():
        assert engine["relative_error"] < 1e-10
        assert set(engine["speed_up"]) == set(script.BASELINES) == set(report["resolve_seconds"])
        assert engine["batch_seconds"]["wall"]["timed"] == 30
    assert all(times["processor"]["timed"] == 2 for times in report["resolve_seconds"].values())
    assert report["provenance"]["packages"]["torch"] and report["provenance"]["hardware"]["processor"]
