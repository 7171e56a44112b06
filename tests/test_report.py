"""What a benchmark leaves: tables as text and as LaTeX, figures, files that are whole or not there, and all of it read back."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas

from hyperlm.bench import figures, latex, report, tables
from hyperlm.bench.figures import axes, disk, heatmap, lines, style
from hyperlm.bench.result import Bars, Disk, Figure, Heatmap, Lines, Result, Row, Table
from hyperlm.runs import RunError

MACHINE = {"torch": "2.13", "cpu": "of_a kind", "gpu": ""}
KINDS = ("phase7", "phase8", "softmax", "hybrid")


def losses(shift: float = 0.0) -> list[Row]:
    return [
        {"model": m, "seed": s, "length": n, "loss": 3 + i / 10 + s / 100 + 50 / n + shift}
        for i, m in enumerate(KINDS)
        for s in (0, 1)
        for n in (64, 128, 256)
    ]


def points(shift: float = 0.0) -> list[Row]:
    return [
        {"x": 0.9 * math.cos(i + shift), "y": 0.9 * math.sin(i), "label": f"word {i}", "group": "ab"[i % 2], "head": i % 2}
        for i in range(20)
    ]


FIGURES = {
    "lines": Lines(
        "lines", "Loss by length", "t", "length", "loss", over="seed", x_label="length (tokens)", log_x=True, levels={"chance": 5.5}
    ),
    "settings": Lines("settings", "Loss by length and seed", "t", "length", "loss", ("model", "seed"), log_y=True),
    "bars": Bars("bars", "Loss", "t", "model", "loss", "loss (nats)"),
    "heatmap": Heatmap("heatmap", "Loss by length and seed", "t", "length", "seed", "loss"),
    "disk": Disk("disk", "Tokens", "points", panels="head"),
}


def result(shift: float = 0.0, names: str = "bars") -> Result:
    return Result(
        "quality",
        [Table("t", losses(shift), "In nats."), Table("points", points(shift), shown=False)],
        ["a note"],
        [FIGURES[n] for n in names.split()],
    )


# -- tables ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 22222], ["1", "22,222"]),
        ([1234.5, None], ["1,234", ""]),
        ([3.04, 3.1234], ["3.040", "3.123"]),  # as many decimals each
        ([5e-4, 2e-3], ["0.0005", "0.0020"]),
        ([1e-9, 5.0], ["1e-09", "5"]),  # or the small one would be nothing
        ([2.0, 100.0, 0.0], ["2", "100", "0"]),
        ([float("nan"), 1.5], ["nan", "1.5"]),
        ([True, "3.12 ± 0.01", "two\nlines"], ["True", "3.12 ± 0.01", "two lines"]),
    ],
)
def test_cells(values, shown):
    assert tables.column(values) == shown


@pytest.mark.parametrize(
    ("values", "digits", "shown"),
    [
        ([1_084_694.2, 714_126.0, 3_456.0], 4, ["1,085,000", "714,100", "3,456"]),  # no digits that say nothing
        ([17_494_720], 4, ["17,494,720"]),  # of what was counted, all
        ([0.1772, 0.0027], 2, ["0.18", "0.00"]),
        ([-0.8354, -0.00067], 4, ["-0.8354", "-0.0007"]),
        ([0.8354, 6e-6], 4, ["0.8354", "6e-06"]),
    ],
)
def test_as_many_digits_as_mean_something(values, digits, shown):
    assert tables.column(values, digits) == shown


def test_errors_have_a_digit_less_than_what_they_are_of():
    assert tables.table([{"loss": 3.1459, "standard error": 0.17305}]).splitlines()[-1] == "|  3.146 |            0.173 |"
    assert tables.table([{"loss": math.nan, "standard error": math.nan}]).splitlines()[-1] == "|    nan |                  |"


def test_what_is_equal_in_all_rows_is_not_shown_where_it_need_not_be_and_failures_stand_below():
    rows = [
        {"model": "phase8", "failed": "no\nluck"},
        *({"model": m, "text": "a1b2", "rate": 0.1, "loss": x} for m, x in (("phase7", 3.0), ("softmax", 3.5))),
    ]
    shown = Table("t", rows, "", quiet=["text", "loss"])
    assert tables.readable(shown) == (
        [
            {"model": "phase8", "rate": "failed", "loss": None},
            {"model": "phase7", "rate": 0.1, "loss": 3.0},
            {"model": "softmax", "rate": 0.1, "loss": 3.5},
        ],
        ["phase8 failed: no luck"],
    )
    other = replace(shown, rows=[*rows, {"model": "hybrid", "text": "c3d4"}])
    assert "text" in tables.readable(other)[0][0]  # texts that differ are told apart
    everywhere = {
        tables.text(Result("s", [shown])),
        latex.latex_table("s", shown),
        report.markdown({"command": "", "commit": "", "date": "", "machine": {}}, [Result("s", [shown])], set()),
    }
    assert all(words.count("no luck") == 1 and "a1b2" not in words for words in everywhere)
    alone = Table("t", [{"model": "phase8", "failed": "why"}])
    assert tables.readable(alone) == (alone.rows, [])


def test_tables_align_numbers_to_the_right_and_show_what_is_missing():
    lines = tables.table([{"model": "a|b", "x": "3.1 ± 0.1"}, {"model": "phase7", "x": "12 ± 1", "failed": "out of memory"}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split("|")[1:4] == [":" + "-" * 8, "-" * 10 + ":", ":" + "-" * 14]
    assert lines[2].split("|")[1:3] == [" a\\", "b    "] and lines[3].split("|")[2] == "    12 ± 1 " and tables.table([]) == ""


# -- LaTeX -----------------------------------------------------------------------------------------------------------------------------

HOSTILE = ["50 % & more_of {it}", "$x^2$ ~ #1 \\ 'quoted' <a>", "[128, 256)", "--data.sources runs/中", "β ± 1 → ∞"]


def balanced(tex: str) -> None:
    """Braces and environments are closed in order, rows have as many cells as their table, and nothing that LaTeX reads as more is bare."""
    bare = re.sub(r"\\[\\{}%&$#_^]|(?m:^%.*$)", lambda m: "" if m[0] != "\\\\" else "\\\\", tex)
    depth = 0
    for c in bare:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0
    open_ones = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", tex):
        open_ones.append(name) if what == "begin" else None
        assert what == "begin" or open_ones.pop() == name
    assert not open_ones
    for spec, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", tex, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert rows and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(spec) - 1}
        assert not re.search(r"(?m)^\s*\[", body)  # would be an argument of the rule or line break before it
    outside = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", bare, flags=re.DOTALL)
    assert not re.search(r"[&$#^]", outside.replace(r"\ensuremath{^", "")) and not re.search(r"\\item \[", tex)
    assert all(ord(c) < latex.LATIN for c in tex)


def test_latex_is_whole_whatever_the_words():
    rows = [{words: words, "n": i, "loss": 1.5} for i, words in enumerate(HOSTILE)]
    wide = [{f"a long name of column {i}": float(i) for i in range(9)} for _ in range(latex.PAGE + 1)]
    tables = [Table("t", rows, caption=words) for words in HOSTILE] + [
        Table("[first]", [{words: words} for words in HOSTILE[2:3]]),
        Table("wide", wide),
        Table("none", []),
        Table("hidden", rows, shown=False),
    ]
    record = {"command": " ".join(HOSTILE), "commit": "", "date": "today", "machine": {"cpu_model": HOSTILE[0]}}
    tex = latex.document(record, [Result("a_suite", tables, HOSTILE, [FIGURES["lines"], FIGURES["bars"]])], {"lines"})
    balanced(tex)
    assert (
        tex.count(r"\begin{table}") == len(HOSTILE) + 3
        and tex.count("(continued)") == 1
        and tex.count(r"\resizebox{\linewidth}") == len(HOSTILE) + 2
    )
    assert (
        r"\includegraphics{lines.pdf}" in tex
        and "bars.pdf" not in tex
        and r"\label{tab:a-suite-wide-2}" in tex
        and "-{}-data.sources" in tex
    )


def test_a_table_can_be_lifted_out_of_latex():
    tex = latex.known(
        latex.latex_table(
            "recall", Table("by width", [{"model": "phase7", "recall": "0.91 ± 0.02"}, {"model": "phase8", "recall": "1"}], "Accuracy.")
        )
    )
    assert (
        tex
        == r"""\begin{table}[t]
\centering\small
\caption{Accuracy.}
\label{tab:recall-by-width}
\begin{tabular}{lr}
\toprule
 model   &      recall \\
\midrule
 phase7  & 0.91 \ensuremath{\pm} 0.02 \\
 phase8  &           1 \\
\bottomrule
\end{tabular}
\end{table}"""
    )


# -- figures ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_as_png_and_pdf_and_follow_the_data(name):
    content = {}
    for shift in (0.0, 0.0, 0.3):
        folder = Path(str(len(content)))
        folder.mkdir()
        assert figures.draw(FIGURES[name], result(shift).tables, folder)
        content[folder] = {path.suffix: path.read_bytes() for path in folder.iterdir()}
    first, again, other = content.values()
    assert first[".png"].startswith(b"\x89PNG") and int.from_bytes(first[".png"][16:20], "big") == round(style.WIDTH * style.DPI)
    assert first[".pdf"].startswith(b"%PDF") and b"/Type3" not in first[".pdf"]  # fonts are embedded as they are
    assert first == again and first[".png"] != other[".png"] and first[".pdf"] != other[".pdf"]


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES.keys())
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"model": "phase7", "failed": "out of memory"}],
        [{"model": "phase7", "length": 64, "seed": 0, "loss": math.nan}],
        [{"model": "phase7", "length": 64, "seed": 0, "loss": "out of memory", "x": math.nan, "y": 0.0}],
    ],
)
def test_where_there_is_nothing_to_draw_no_figure_is_left(figure, rows, tmp_path):
    assert not figures.draw(figure, [Table("t", rows), Table("points", rows)], tmp_path) and not list(tmp_path.iterdir())


def drawn(figure: Figure, rows: list[Row]) -> Canvas:
    with matplotlib.rc_context(figures.STYLE):
        canvas = figures.DRAW[type(figure)](figure, rows)
        canvas.draw_without_rendering()
    return canvas


def lines_of(canvas: Canvas, colour: str) -> list[Any]:
    return [line for line in canvas.axes[0].lines if line.get_color() == colour]


def test_a_line_is_the_mean_over_seeds_in_a_band_from_the_least_to_the_largest():
    canvas = drawn(FIGURES["lines"], losses())
    (line,) = lines_of(canvas, style.COLOURS["phase8"])
    assert line.get_xdata().tolist() == [64, 128, 256]
    assert line.get_ydata() == pytest.approx([3.1 + 0.005 + 50 / n for n in (64, 128, 256)])
    band = canvas.axes[0].collections[1].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(3.1 + 50 / 256) and band[:, 1].max() == pytest.approx(3.11 + 50 / 64)


def test_seeds_that_were_measured_at_other_moments_are_interpolated_where_all_were_measured():
    rows = [{"model": "phase7", "seed": s, "seconds": x, "loss": 10 * x + s} for s, xs in enumerate([(1, 2, 4), (1.5, 3, 5)]) for x in xs]
    x, (mean, least, most) = lines.curve(rows, Lines("f", "", "t", "seconds", "loss", over="seed"))
    apart = [{"model": "phase7", "seed": s, "seconds": s, "loss": 3.0 + s} for s in (0, 1)]
    assert lines.curve(apart, Lines("f", "", "t", "seconds", "loss", over="seed"))[1].tolist() == [[3, 4]] * 3
    assert (
        x == [1.5, 2, 3, 4]
        and mean == pytest.approx(10 * np.array(x) + 0.5)
        and least == pytest.approx(mean - 0.5)
        and most == pytest.approx(mean + 0.5)
    )


def test_a_model_has_one_colour_and_marker_whatever_stands_beside_it():
    looks = set()
    for models in (KINDS, KINDS[::-1], ("runs/x", "softmax")):
        canvas = drawn(FIGURES["lines"], [{"model": m, "length": n, "loss": 1.0 + n} for m in models for n in (1, 2)])
        (line,) = lines_of(canvas, style.COLOURS["softmax"])
        looks.add((line.get_marker(), line.get_linestyle()))
    grey = sorted(np.array([0.299, 0.587, 0.114]) @ to_rgb(style.COLOURS[kind]) for kind in KINDS)
    assert len(looks) == 1 and min(np.diff(grey)) > 0.14  # told apart without colour


def test_a_run_has_the_colour_of_the_kind_that_its_folder_speaks_of():
    own = style.COLOURS
    assert style.colours(["study/phase8", "runs/my-hybrid", "N4-phase7"]) == {
        "study/phase8": own["phase8"],
        "runs/my-hybrid": own["hybrid"],
        "N4-phase7": own["phase7"],
    }
    both = style.colours(["study/phase8", "phase8", "a/phase8-phase7", "runs/x"])
    assert both["phase8"] == own["phase8"] and len(set(both.values())) == 4  # one name, one colour
    assert not {both["study/phase8"], both["a/phase8-phase7"], both["runs/x"]} & {own[kind] for kind in KINDS}


@pytest.mark.parametrize(
    ("values", "low", "high", "least", "most"),
    [
        ([3.0, 3.02], None, None, (0, 2.95), (3.1, 3.3)),  # 0.7 % does not fill the axis
        ([3.0, 5.0], None, None, (2.5, 3.0), (5.0, 5.3)),
        ([10.0, 100.0], None, None, (0, 0), (100, 110)),  # from zero where it costs little
        ([-0.1, 0.2], None, None, (-0.2, -0.1), (0.2, 0.25)),
        ([3.0, 9.0], None, 4.0, (2.5, 3.0), (4, 4)),
        ([0.0, 0.0], 0.0, 1.0, (0, 0), (1, 1)),
        ([0.0], None, None, (-1, 0), (0.1, 1)),
        ([-5.0], None, None, (-6, -5), (-5, -4)),
    ],
)
def test_limits_are_honest(values, low, high, least, most):
    found = axes.limits(values, low, high)
    assert least[0] <= found[0] <= least[1] and most[0] <= found[1] <= most[1]


def test_an_axis_that_does_not_begin_at_zero_or_ends_early_says_so():
    figure = Lines("f", "", "t", "length", "loss", y_label="loss (nats)", high=3.5)
    assert re.fullmatch(r"loss \(nats\)\n\(axis from 3\.\d+; above 3\.5 not shown\)", drawn(figure, losses()).axes[0].get_ylabel())
    assert drawn(figure, [{"model": "a", "length": n, "loss": n / 100} for n in range(300)]).axes[0].get_ylabel() == "loss (nats)"


def test_an_arm_near_divergence_does_not_flatten_the_others():
    figure = replace(FIGURES["lines"], levels={}, log_x=False, over="", y_label="loss", within=0.5)
    rows = [{"model": m, "length": n, "loss": x + n / 100} for m, x in (("phase7", 3.0), ("phase8", 3.2), ("nanogpt", 3.9)) for n in (0, 1)]
    canvas = drawn(figure, rows)
    low, high = canvas.axes[0].get_ylim()
    assert 2.9 <= low <= 3.0 and high == pytest.approx(3.5) and "above 3.5 not shown" in canvas.axes[0].get_ylabel()
    assert {text.get_text() for text in canvas.legends[0].get_texts()} == {"phase7", "phase8", "nanogpt (from 3.9)"}
    near = drawn(figure, rows[:4])
    assert near.axes[0].get_ylim()[1] < 3.4 and "not shown" not in near.axes[0].get_ylabel()


def test_names_of_levels_stand_beside_the_axes():
    axes = drawn(FIGURES["lines"], losses()).axes[0]
    (name,) = axes.texts
    assert name.get_text() == "chance" and name.get_window_extent().x0 >= axes.get_window_extent().x1


@pytest.mark.parametrize("values", [[3.5], [3.5, 3.52], [3.5, 9.0], [1.0, 50.0], [1e-3, 1e6]])
def test_logarithmic_axes_have_ticks_and_show_small_differences_as_small(values):
    axes = drawn(Lines("f", "", "t", "at", "loss", log_y=True), [{"model": "a", "at": i, "loss": y} for i, y in enumerate(values)]).axes[0]
    low, high = axes.get_ylim()
    assert low < min(values) and high > max(values) and high / low > 1.1
    assert 2 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 9


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([2**i for i in range(9, 15)], ["512", "1,024", "2,048", "4,096", "8,192", "16,384"]),
        ([2**i for i in range(7, 18)], ["128", "512", "2,048", "8,192", "32,768", "131,072"]),  # as many as there is room for
        ([0.5 / 512, 1 / 512, 2 / 512], ["0.000977", "0.00195", "0.00391"]),
        (["[0, 64)", "[64, 128)"], ["[0, 64)", "[64, 128)"]),
    ],
)
def test_ticks_are_at_what_was_measured(values, labels):
    axes = drawn(Lines("f", "", "t", "at", "loss", log_x=True), [{"model": "a", "at": x, "loss": 1.0} for x in values]).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == labels


def test_bars_begin_at_zero_and_marks_take_their_place_where_that_would_hide_all():
    bars = drawn(FIGURES["bars"], [{"model": m, "loss": x} for m, x in zip(KINDS, (0.1, 1.0, -0.5, 2.0), strict=True)]).axes[0]
    assert [patch.get_x() for patch in bars.patches] == [0] * 4 and "axis from" not in bars.get_xlabel()
    marks = drawn(FIGURES["bars"], losses()).axes[0]
    assert not marks.patches and "axis from" in marks.get_xlabel()


def test_bars_have_the_colour_of_their_model_and_a_mark_for_their_null():
    rows = [
        {"layers": layers, "model": layers[:6], "head": i, "share": 0.2 * i, "untrained": 0.9 + 0.1 * i}
        for layers in ("phase7", "hybrid: 3")
        for i in (0, 1)
    ]
    canvas = drawn(Bars("f", "", "t", "layers", "share", null="untrained"), rows)
    assert [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in canvas.axes[0].patches] == [
        style.COLOURS[kind] for kind in ("phase7", "hybrid")
    ]
    nulls = [line for line in canvas.axes[0].lines if line.get_marker() == "D"]
    assert [line.get_xdata() for line in nulls] == [[pytest.approx(0.95)]] * 2 and [
        text.get_text() for text in canvas.legends[0].get_texts()
    ] == ["untrained"]
    parts = drawn(Bars("f", "", "t", "part", "nats"), [{"part": part, "nats": 0.1 * i} for i, part in enumerate("ab", 1)])
    assert {matplotlib.colors.to_hex(patch.get_facecolor()) for patch in parts.axes[0].patches} == {style.NEUTRAL}


def test_cells_of_panels_share_one_scale_of_colours():
    canvas = drawn(Heatmap("f", "", "t", "length", "seed", "loss", low=0, high=8), losses())
    panels = [axes for axes in canvas.axes if axes.images]
    assert len(panels) == len(KINDS) and {axes.images[0].get_clim() for axes in panels} == {(0, 8)}
    assert [text.get_text() for text in panels[1].texts] == [f"{3.1 + s / 100 + 50 / n:.2f}" for s in (0, 1) for n in (64, 128, 256)]


@pytest.mark.parametrize(
    ("values", "room", "words"),
    [
        ([0.514, -0.51, -0.001, math.nan], 0.25, ["0.51", "−0.51", "0.00", "–"]),
        ([0.514, -0.51, 1.0], 0.18, [".51", "−.51", "1.00"]),
        ([0.514, -0.51, -0.001], 0.14, [".5", "−.5", ".0"]),
        ([0.514, -0.51], 0.1, ["", ""]),
        ([1234.5, -3.0], 0.3, ["1,230", "−3"]),
    ],
)
def test_numbers_in_cells_are_as_long_as_there_is_room(values, room, words):
    assert heatmap.in_cells(np.array(values), room) == words


def test_labels_of_points_cover_neither_points_nor_one_another():
    rng = np.random.default_rng(0)
    rows = [{"x": x, "y": y, "label": f"token {i}", "group": "g"} for i, (x, y) in enumerate(rng.uniform(-0.6, 0.6, (80, 2)))]
    axes = drawn(Disk("f", "", "t"), rows).axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("token")]
    assert 30 < len(boxes) < 80  # what has no place is left out
    assert not any(disk.overlap(a.extents, b.extents) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*axes.transData.transform((row["x"], row["y"]))) for box in boxes for row in rows)


def test_hostile_words_are_drawn_as_they_are(recwarn, tmp_path):
    rows = [
        {"model": f"{i}{words}", "length": n, "seed": 0, "loss": 1.0, "x": 0.1 * i, "y": 0.3, "label": words, "group": words, "head": i % 2}
        for i, words in enumerate(HOSTILE)
        for n in (1, 2)
    ]
    assert (
        all(figures.draw(figure, [Table("t", rows), Table("points", rows)], tmp_path) for figure in FIGURES.values()) and not recwarn.list
    )


# -- files -----------------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_can_be_written_again():
    odd = Table("odd", [{"n": np.float32(0.5), "m": np.int64(3), "bad": math.nan, "worse": np.float32("inf")}])
    written = Result("quality", [*result().tables, odd], ["a note"], list(FIGURES.values()))
    report.write(Path("b"), [written], MACHINE, "python bench.py")
    (found,) = report.load(Path("b"))
    assert found.figures == written.figures and found.notes == written.notes and found.tables[:2] == written.tables[:2]
    assert found.tables[2].rows[0] | {"bad": 0, "worse": 0} == {"n": 0.5, "m": 3, "bad": 0, "worse": 0} and all(
        math.isnan(found.tables[2].rows[0][x]) for x in ("bad", "worse")
    )
    record = json.loads(Path("b/results.json").read_text(), parse_constant=pytest.fail)
    assert (
        record["command"] == "python bench.py"
        and record["machine"] == MACHINE
        and re.fullmatch(r"[0-9]{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", record["date"])
    )
    report.write(Path("c"), [replace(found, figures=[found.figures[0]])], MACHINE, "python bench.py")
    assert (
        {path.name for path in Path("b").iterdir()}
        > {path.name for path in Path("c").iterdir()}
        == {"results.json", "report.md", "report.tex", "lines.png", "lines.pdf"}
    )
    assert Path("b/lines.pdf").read_bytes() == Path("c/lines.pdf").read_bytes()


def test_a_report_shows_what_is_shown():
    report.write(Path("b"), [result()], MACHINE, "python bench.py")
    text = Path("b/report.md").read_text()
    assert (
        "`python bench.py`" in text
        and "- cpu: of_a kind" in text
        and "gpu" not in text
        and "### t\n\nIn nats.\n\n| model" in text
        and "- a note" in text
    )
    assert "### points" not in text and "![Loss](bars.png)" in text and "word 1" not in text
    assert (
        tables.text(result()).startswith("quality, t\n| model")
        and "word 1" not in tables.text(result())
        and tables.text(result()).endswith("a note")
    )


def test_results_grow_and_models_beside_them_stay():
    first, more = Result("speed", [Table("t", losses()[:3])]), result()
    report.write(Path("b"), [first], MACHINE, "x")
    Path("b/phase7").mkdir()
    report.write(Path("b"), [first, more], MACHINE, "x")
    assert report.load(Path("b")) == [first, more] and Path("b/phase7").is_dir() and Path("b/bars.pdf").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_written_before_is_kept_when_writing_is_interrupted(error, monkeypatch):
    def stopped(*_: Any) -> bool:
        raise error

    report.write(Path("b"), [result()], MACHINE, "x")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    monkeypatch.setattr(figures, "draw", stopped)
    for folder in ("b", "new"):
        with pytest.raises(type(error)):
            report.write(Path(folder), [result(1.0)], MACHINE, "x")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before and [
        path.name for path in Path().iterdir()
    ] == ["b"]


def test_a_figure_that_cannot_be_drawn_is_a_note(capsys):
    report.write(
        Path("b"), [Result("quality", [Table("t", losses())], [], [Bars("f", "Loss", "no such table", "model", "loss")])], MACHINE, "x"
    )
    assert "- f is not drawn: KeyError: 'no such table'" in Path("b/report.md").read_text() and "f is not drawn" in capsys.readouterr().out
    assert report.load(Path("b"))[0].notes == []


def test_reports_of_several_benchmarks_are_joined():
    for name, shift in (("a", 0.0), ("b", 1.0)):
        report.write(Path(name), [result(shift), Result(name, [Table(name, [{"x": shift}])])], MACHINE, f"bench of {name}")
    both, a, b = report.join([Path("a"), Path("b")])
    assert both.suite == "quality" and [t.name for t in both.tables] == ["t", "points"]
    apart = [row | {"model": f"{row['model']} ({name})"} for name, rows in (("a", losses()), ("b", losses(1.0))) for row in rows]
    assert both.tables[0].rows == apart
    assert both.figures == [FIGURES["bars"]] and [note[:13] for note in both.notes] == ["a: bench of a", "a note", "b: bench of b"]
    assert all(note.endswith(f", {MACHINE['cpu']})") for note in both.notes if "bench of" in note)  # where each was measured
    assert (a.suite, b.suite) == ("a", "b") and b.tables[0].rows == [{"x": 1.0}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no results.json in it"),
        ("{", "cannot be read"),
        ("[]", "holds no results"),
        ('{"command": "x", "results": [{"suite": "speed", "rows": []}]}', "of another version"),
        ('{"command": "x", "results": [3]}', "damaged"),
        ('{"command": "x", "results": [{"suite": "s", "tables": [], "notes": [], "figures": [{"kind": "Pie"}]}]}', "damaged"),
    ],
)
def test_results_that_cannot_be_read_are_named(content, message):
    Path("b").mkdir()
    if content is not None:
        Path("b/results.json").write_text(content)
    for read in (lambda: report.load(Path("b")), lambda: report.join([Path("b")])):
        with pytest.raises(RunError, match=message):
            read()


def test_the_commit_of_the_code_is_told_apart_from_changed_code(tmp_path, monkeypatch):
    import subprocess

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    code = tmp_path / "hyperlm/bench/report.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    monkeypatch.setattr(report, "__file__", str(code))
    assert report.commit() == ""  # no checkout
    git("init"), git("add", "."), git("commit", "-m", "first")
    assert git("rev-parse", "HEAD").startswith(report.commit()) and len(report.commit()) == 12
    code.write_text("x")
    assert report.commit().endswith("+changes")
