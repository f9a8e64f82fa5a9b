"""What notebooks call: recording, display, and the checks on the way."""

from __future__ import annotations

import json
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from editkit.base.errors import ConfigError
from editkit.press import start
from editkit.press.describe import describe
from editkit.press.format import check_spec, format_number, format_value
from editkit.press.plotting import INK, PALETTE, look, spread_labels, themed_svg
from editkit.press.report import PARAMETERS, RUN_DIR, WORK_DIR, Run

matplotlib.use("agg")


@pytest.fixture
def run(tmp_path):
    """A run that is recorded, as under `editkit run`."""
    return Run({"n": 3}, tmp_path / "my-run")


@pytest.fixture
def frame():
    return pd.DataFrame({"method": ["memit", "rome"], "score": [0.98765, 0.5], "n": [1200, 7]})


def figure(name="fig"):
    fig, ax = plt.subplots()
    ax.plot([1, 2], [3, 1], **look("memit").line())
    ax.set_title(name)
    return fig


def test_everything_lands_in_the_results(run, frame):
    run.value(
        "memit.efficacy",
        np.float64(0.98765),
        lo=0.9,
        hi=1.0,
        n=np.int64(100),
        fmt="%",
        note="ROME protocol",
        kind="exact",
    )
    run.table("scores", frame, caption="Scores.", fmt={"score": ".1%"})
    run.figure("tradeoff", figure(), caption="A caption.", data=frame)
    for _ in range(2):
        with run.timed("edit"):
            pass
    run.finish()
    results = json.loads((run.directory / "results.json").read_text())
    assert results["parameters"] == {"n": 3}
    assert results["values"]["memit.efficacy"] == {
        "value": 0.98765, "lo": 0.9, "hi": 1.0, "n": 100, "unit": "", "note": "ROME protocol", "fmt": ".1%",
        "kind": "exact",
    }  # fmt: skip
    assert results["timings"]["edit"] >= 0
    assert pd.read_csv(run.directory / results["tables"]["scores"]["file"]).equals(frame)
    assert pd.read_csv(run.directory / results["figures"]["tradeoff"]["data"]).equals(frame)
    assert results["hardware"]["cores"] >= 1 and results["peak_memory_mib"]["host"] > 1
    assert results["packages"]["numpy"] == np.__version__
    assert "editkit.press.report" in results["read"]["modules"]
    assert not list(run.directory.glob(".*"))


def test_a_key_may_be_repeated_only_interactively(run):
    run.value("a", 1)
    with pytest.raises(ConfigError, match="recorded twice"):
        run.value("a", 2)
    free = Run({})
    free.value("a", 1)
    assert float(free.value("a", 2)) == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": float("nan")}, "NaN"),
        ({"x": [1, 2]}, "expected a number"),
        ({"x": 1.0, "lo": 0.5}, "both ends"),
        ({"x": 1.0, "lo": 2.0, "hi": 1.0}, "both ends"),
        ({"x": 1.0, "fmt": "zz"}, "number format"),
        ({"x": 1.0, "key": "no spaces"}, "no key"),
        ({"x": 1.0, "kind": "bootstrp"}, "did you mean 'bootstrap'"),
        ({"x": 1.0, "key": "../up"}, "no key"),
    ],
)
def test_bad_values_are_refused(run, options, message):
    with pytest.raises(ConfigError, match=message):
        run.value(options.pop("key", "k"), options.pop("x"), **options)
    assert not run.numbers


def test_a_frame_is_recorded_in_one_call(run):
    rows = [
        {"method": "memit", "axis": "efficacy", "mean": 0.5, "lo": 0.4, "hi": 0.6, "n": 10},
        {"method": "rome", "axis": "efficacy", "mean": 0.7, "lo": np.nan, "hi": np.nan, "n": 3},
        {"method": "ft", "axis": "efficacy", "mean": np.nan, "lo": np.nan, "hi": np.nan, "n": 0},
    ]
    made = run.values(
        pd.DataFrame(rows),
        "{method}.{axis}",
        note="{axis} of {method}",
        kind="bootstrap",
        scale=100,
        unit="points",
    )
    assert [value.key for value in made] == ["memit.efficacy", "rome.efficacy", "ft.efficacy"]
    first, second, third = (value.record for value in made)
    assert (first["value"], first["lo"], first["hi"], first["n"]) == (50.0, 40.0, 60.0, 10)
    assert first["kind"] == "bootstrap" and first["note"] == "efficacy of memit" and first["unit"] == "points"
    assert (second["value"], second["lo"], second["hi"]) == (70.0, None, None) and third["value"] is None
    seconds = pd.DataFrame({"m": ["a"], "s": [1.5]})
    [value] = run.values(seconds, "{m}.seconds", x="s", n=3, fmt=".1f", kind="seeds")
    assert value.record["n"] == 3 and value.record["lo"] is None
    with pytest.raises(ConfigError, match="no column 'mean'; it has m, s"):
        run.values(seconds, "{m}.again")
    with pytest.raises(KeyError):
        run.values(seconds, "{method}.seconds", x="s")


def test_nothing_is_recorded_after_the_end(run):
    run.finish()
    for late in (lambda: run.value("a", 1), lambda: run.table("t", pd.DataFrame({"x": [1]}))):
        with pytest.raises(ConfigError, match=r"after run.finish\(\)"):
            late()


def test_a_parameter_changed_in_a_later_cell_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(PARAMETERS, json.dumps({"n": 3, "layers": [1]}))
    monkeypatch.setenv(RUN_DIR, str(tmp_path))
    for change in ({"n": 99}, {"layers": [1, 2]}):
        namespace = {"n": 3, "layers": [1]}
        run = start(namespace, style=False)
        namespace |= change
        with pytest.raises(ConfigError, match="the notebook set it to"):
            run.finish()
    assert not (tmp_path / "results.json").exists()


CELL = "n_edits: int = 100  # how many\nrate: float = 0.5  # share [0..1]\nlayers: list = []  # [0..]"


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("n_edit = 100", "unknown parameter of this notebook 'n_edit'; did you mean 'n_edits'"),
        ('n_edits = "forty"', "n_edits is declared as int, got 'forty'"), ("n_edits = 12.5", "as int"),
        ("n_edits = True", "as int"), ("n_edits = -5", "above 0"), ("n_edits = 0", "above 0"),
        ('rate = float("nan")', "finite"), ("rate = 2", r"in \[0..1\]"), ("layers = [-1]", r"in \[0..\]"),
    ],
)  # fmt: skip
def test_what_papermill_injects_is_checked_before_any_work(injected, message):
    """papermill itself warns of a misspelt name in its log, and checks nothing else."""
    cell = f"# Parameters\n{injected}\n"
    namespace: dict = {"In": ["", CELL, cell, "run = start(globals())"]}
    exec(CELL + "\n" + cell, namespace)
    with pytest.raises(ConfigError, match=message):
        start(namespace, style=False)
    namespace |= {"In": ["", CELL, "# Parameters\nn_edits = 5\n"], "n_edits": 5, "rate": 0.5, "layers": []}
    assert start(namespace, style=False).parameters == {"n_edits": 5, "rate": 0.5, "layers": []}


def test_infinity_and_missing_survive_json(run):
    run.value("collapsed", np.inf)
    run.value("unknown", None)
    run.finish()
    values = json.loads((run.directory / "results.json").read_text())["values"]
    assert [format_value(values[k]) for k in ("collapsed", "unknown")] == ["∞", "n/a"]


def test_table_rejects_formats_of_absent_columns(run, frame):
    with pytest.raises(ConfigError, match="'efficacy'"):
        run.table("t", frame, fmt={"efficacy": ".1f"})


def test_table_display_is_formatted_and_escaped(run):
    table = run.table("t", pd.DataFrame({"a<b": ["x&y"], "p": [0.5], "n": [1234]}), fmt=".1%")
    html = table._repr_html_()
    assert "<th>a&lt;b</th>" in html and "x&amp;y" in html
    assert "50.0\u202f%" in html and "1,234" in html


def test_figure_needs_words(run):
    with pytest.raises(ConfigError, match="caption"):
        run.figure("f", figure(), caption=" ")
    with pytest.raises(ConfigError, match="alt text where its axes hold no data"):
        run.figure("f", plt.figure(), caption="A drawing.")


def test_the_alt_text_is_made_from_what_is_drawn(run):
    fig, (left, right) = plt.subplots(1, 2)
    left.plot([1, 10], [0.25, 0.75], label="MEMIT")
    left.axvline(3)  # a guide, no data
    left.set(xlabel="edits", ylabel="kept", title="Streams")
    right.bar(["a", "b"], [2, 5], label="n")
    right.scatter([0, 1], [7, 9])
    words = describe(fig)
    assert (
        words
        == "Streams: kept against edits: MEMIT 0.25 at 1, 0.75 at 10. Panel: n: a 2, b 5; points 1 7 to 9 at 0 to 1."
    )
    left.get_lines()[0].set_ydata([0.25, 0.5])
    assert "0.5 at 10" in describe(fig), "other data, other words"
    svg = run.figure("f", fig, caption="c", alt="Two panels.").svg
    assert "Two panels. Streams: kept" in svg


def test_tick_labels_are_not_printed_on_top_of_each_other():
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot([0, 1], [0, 1])
    ax.set_xticks([0, 0.5, 0.501, 1])
    svg = themed_svg(fig, prefix="p")
    plt.close(fig)
    assert svg.count(">0.500<") == 1 and svg.count(">0.501<") == 0 and svg.count(">1.000<") == 1


def test_labels_of_points_are_moved_apart():
    fig, ax = plt.subplots(figsize=(4, 3))
    ax.scatter([1, 1.01, 2], [1, 1.01, 2])
    ax.text(1, 1, "first of them")
    ax.annotate("second of them", (1.01, 1.01), xytext=(4, 0), textcoords="offset points")
    ax.annotate("far away", (2, 2))
    fig.canvas.draw()
    boxes = lambda: [t.get_window_extent() for t in ax.texts]  # noqa: E731
    assert boxes()[0].overlaps(boxes()[1])
    spread_labels(fig)
    found = boxes()
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[i + 1 :])
    plt.close(fig)


def test_what_came_out_is_said_by_quotation(run):
    run.value("a.x", 0.9, lo=0.85, hi=0.95, fmt=".0%")
    run.value("b.x", 0.5, lo=0.4, hi=0.6, fmt=".0%")
    run.value("c", 3)
    text = run.says(
        "A keeps {a.x}, {a.x <> b.x} B's {b.x bare}. B has {b.x <> a.x}. One is {c <> c} itself. Lost: {d.x}."
    ).text
    assert (
        text
        == "A keeps 90\u202f% [85, 95], more than B's 50\u202f%. B has less than. One is equal to itself."
    )
    assert " ".join(run.said) == text
    run.value("e", 0.92, lo=0.9, hi=0.99)
    assert run.says("{a.x <> e}.").text == "not clearly different from."


def test_figures_follow_the_theme_and_can_share_a_page(run):
    start({"__annotations__": {}})  # applies the plot style
    plt.close("all")
    first = run.figure("one", figure(), caption="c", alt='a "quoted" <alt>').svg
    second = run.figure("two", figure(), caption="c", alt="b").svg
    ids = re.findall(r'\bid="([^"]+)"', first)
    assert len(ids) == len(set(ids)) and not set(ids) & set(re.findall(r'\bid="([^"]+)"', second))
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', first)
    assert references and set(references) <= set(ids)
    assert f"var(--ek-ink, var(--jp-content-font-color1, {INK}))" in first
    assert f"var(--ek-c0, {PALETTE[0]})" in first
    assert 'aria-label="a &quot;quoted&quot; &lt;alt&gt; ' in first
    assert not plt.get_fignums(), "the figure must be closed, or Jupyter shows it twice"


def test_svg_is_deterministic(run):
    matplotlib.rcdefaults()  # whatever style is set, or none
    texts = [Run({}, run.directory).figure("f", figure(), caption="c", alt="a").svg for _ in range(2)]
    assert 'id="' in texts[0]
    assert texts[0] == texts[1] and "20" + "26-" not in texts[0].split("<defs>")[0]


def test_interactive_runs_write_nothing(tmp_path, monkeypatch, frame, capsys):
    for name in (RUN_DIR, PARAMETERS, WORK_DIR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    run = start({"__annotations__": {"n": int}, "n": 3, "frame": frame}, style=False)
    assert run.parameters == {"n": 3} and not run.recorded
    run.value("a", 1)
    run.table("t", frame)
    run.figure("f", figure(), caption="c", alt="a")
    run.finish()
    assert list(tmp_path.iterdir()) == []
    assert "nothing was written" in capsys.readouterr().out


def test_start_notices_overwritten_parameters(monkeypatch, tmp_path):
    monkeypatch.setenv(PARAMETERS, json.dumps({"n": 10}))
    monkeypatch.setenv(RUN_DIR, str(tmp_path))
    assert start({"n": 10}, style=False).parameters == {"n": 10}
    with pytest.raises(ConfigError, match="passed as 10 but the notebook set it to 3"):
        start({"n": 3}, style=False)


def test_start_refuses_parameters_that_are_not_plain_data():
    with pytest.raises(ConfigError, match="'model' is a object"):
        start({"__annotations__": {"model": object}, "model": object()}, style=False)


@pytest.mark.parametrize(
    ("x", "spec", "text"),
    [
        (0.98765, ".1%", "98.8\u202f%"), (0.98765, "%", "98.8\u202f%"), (1234567, None, "1,234,567"),
        (0.000123456, None, "0.000123"), (-1.5, ".1f", "−1.5"), (-0.0001, ".1f", "0.0"), (True, None, "yes"),
        (3.0, ",d", "3"), (float("-inf"), None, "−∞"), (np.float64(1.25), ".2f", "1.25"),
    ],
)  # fmt: skip
def test_format_number(x, spec, text):
    assert format_number(x.item() if hasattr(x, "item") else x, spec) == text


def test_format_value_with_interval_and_unit():
    record = {"value": 0.9871, "lo": 0.979, "hi": 0.993, "unit": "", "fmt": ".1%"}
    assert format_value(record) == "98.7\u202f% [97.9, 99.3]"
    assert format_value(record, interval=False) == "98.7\u202f%"
    assert format_value(record, spec=".2f") == "0.99 [0.98, 0.99]"
    assert format_value({"value": 1.234, "unit": "s", "fmt": ".1f"}) == "1.2\u202fs"


@pytest.mark.parametrize("spec", ["{}", "1f%d", "__import__", ".2q", "!r"])
def test_only_number_formats_are_formats(spec):
    with pytest.raises(ConfigError):
        check_spec(spec)


def test_looks_are_fixed_and_forgiving():
    assert look("MEMIT") == look("memit") and look("memit_seq") == look("MEMIT-SEQ")
    assert look("memit").color == look("memit-seq").color != look("alphaedit").color
    assert look("a-method-nobody-listed") == look("a_method_nobody_listed".replace("_", "-"))


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (1.0, 10.0, {"1", "2", "5", "10"}),
        (11.0, 13.5, {"11", "12", "13"}),
        (0.003, 0.2, {"0.005", "0.01", "0.1"}),
    ],
)
def test_short_log_axes_are_labelled_in_plain_numbers(low, high, labels):
    fig, axes = plt.subplots()
    axes.plot([1, 2], [low, high])
    axes.set(yscale="log", ylim=(low, high))
    themed_svg(fig, prefix="log")
    texts = [
        t.get_text() for t in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True)) if t.get_text()
    ]
    plt.close(fig)
    assert labels <= set(texts) and not [t for t in texts if "^" in t]
    assert len(texts) == len(set(texts)) <= 12


def test_long_log_axes_and_own_ticks_stay():
    import matplotlib.pyplot as plt

    fig, (long, own) = plt.subplots(ncols=2)
    for axes, high in ((long, 1e7), (own, 8.0)):
        axes.plot([1, 2], [1.0, high])
        axes.set_yscale("log")
    own.set_yticks([1, 4], ["one", "four"])
    themed_svg(fig, prefix="log")
    found = [[t.get_text() for t in axes.get_yticklabels()] for axes in (long, own)]
    plt.close(fig)
    assert any("10^{6}" in t for t in found[0]) and found[1] == ["one", "four"]


def test_an_outline_is_told_in_words():
    from editkit.press.describe import describe

    fig, (left, right) = plt.subplots(1, 2)
    left.stairs([1, 3, 2], [0, 1, 2, 3])
    right.hist([1.0, 2.0, 2.1, 4.0], 3, histtype="step", label="probes")
    said = describe(fig)
    plt.close(fig)
    assert "highest at 1.5" in said and "probes over 1 to 4" in said
