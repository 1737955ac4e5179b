"""The plots: what is drawn is what was given; one color and marker per method; the same bytes."""

import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_compare import judged, make_result, make_study, rows_of

from report import plots

GAINS = {"lora": 0, "qlora": 0, "hira": 6, "sparse_lora": 0.7, "lora-rank32": 1}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    made, right = make_study(GAINS, seeds=6), np.arange(400) % 2 > 0
    for seed in range(6):
        for lr in (1e-3, 2e-3):
            made.append(make_result("head_only", seed, lr, correct=right, peak=80))
    for result in made:  # 200 MiB, of QLoRA 150
        if result["method"] == "qlora":
            result["memory"]["train"]["frozen weights"] = 50 * 2**20
    (group,) = judged(tmp_path_factory.mktemp("study"), *made)
    return group


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: saved.append(self))
    return saved


def has(axes, points):
    points = np.array(points, float)
    lines = [np.array(line.get_xydata()) for line in axes.get_lines()]
    return any(x.shape == points.shape and np.allclose(x, points) for x in lines)


def test_the_forest_shows_mean_intervals_seeds_and_margin(group, figures, tmp_path):
    assert plots.forest(group, tmp_path / "forest.png")
    (axes,) = figures[0].axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["LoRA rank 32", "QLoRA", "HiRA", "Sparse LoRA"]
    for y, label in enumerate(labels):
        pair = group.versus_lora[label]
        assert has(axes, [[pair.mean, y]])
        for key in ("95 % interval", "95 %, seeds only"):
            assert has(axes, [[x, y] for x in pair.intervals[key]])
        assert has(axes, [[x, y + 0.27] for x in pair.each])
    band = axes.patches[0]
    assert (band.get_x(), band.get_width()) == (-1, 2)
    title, note = (text.get_text().replace("\n", " ") for text in figures[0].texts)
    assert title == "LoRA is worse than HiRA; equal to QLoRA; not told apart from Sparse LoRA"
    assert "gray: within the margin of 1 point" in note


def test_learning_rates_show_mean_range_over_seeds_and_the_best(group, figures, tmp_path):
    assert plots.lr(group, tmp_path / "lr.png")
    panels = [axes for axes in figures[0].axes if axes.get_visible()]
    labels = ["LoRA", "LoRA rank 32", "QLoRA", "HiRA", "Sparse LoRA"]
    assert [axes.get_title() for axes in panels] == [f"{label}\nbest: 0.002" for label in labels]
    for axes, label in zip(panels, labels, strict=True):
        row = rows_of(group)[label]
        scores = list(row.dev.values())
        assert axes.get_xscale() == "log"
        assert has(axes, np.transpose([row.lrs, np.mean(scores, 1)]))
        assert has(axes, [[0.002, 0], [0.002, 1]])
        band = axes.collections[0].get_paths()[0].vertices
        assert band[:, 1].min() == pytest.approx(np.min(scores))
        assert band[:, 1].max() == pytest.approx(np.max(scores))


def test_memory_is_stacked_by_its_parts_and_adds_up(group, figures, tmp_path):
    assert plots.memory(group, tmp_path / "memory.png")
    (axes,) = figures[0].axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [row.label for row in group.rows]
    widths = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])
    assert widths[:, 1] == pytest.approx([100, 12.5, 37.5, 50])
    assert widths.sum(0) == pytest.approx([80, 200, 200, 150, 200, 200])
    starts = np.array([[bar.get_x() for bar in bars] for bars in axes.containers])
    assert starts == pytest.approx(np.cumsum(widths, 0) - widths)
    title = "QLoRA needs the least memory of the adapters: 150 MiB"
    assert figures[0].texts[0].get_text() == title


def test_a_method_has_one_color_and_marker_and_a_variant_is_hollow(group):
    looks = list(plots.LOOKS.values())
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    plain, variant = (plots.look(rows_of(group)[x]) for x in ("LoRA", "LoRA rank 32"))
    assert (plain["color"], plain["marker"]) == plots.LOOKS["lora"]
    assert plain["color"] == variant["color"] == plain["mfc"] and variant["mfc"] == "none"


def test_perplexity_says_that_left_is_better(tmp_path, figures):
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 9}, lm=True))
    plots.forest(group, tmp_path / "forest.png")
    (axes,) = figures[0].axes
    assert "percent of LoRA's perplexity (left is better)" in axes.get_xlabel()
    assert axes.patches[0].get_width() == 4


def test_long_and_odd_names_stay_inside_and_are_no_formula(tmp_path, monkeypatch):
    """A "$" is a dollar; names lie within the figure; letters without a glyph say nothing."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *x, **y: (drawn.append(self), save(self, *x))
    )
    made = make_study({"lora": 0}, 6) + make_study({"hira": 1}, 6, name="水" + "x" * 30 + r"$")
    for result in made:
        result |= {"dataset": "data " * 30, "model": r"$\frac{ model $x$ " * 5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw(judged(tmp_path, *made), tmp_path)
    assert len(drawn) == 3
    for figure in drawn:
        texts = list(figure.texts)
        for axes in figure.axes:
            texts += [axes.title, *axes.get_yticklabels()]
        assert any(r"\$\frac{" in text.get_text() for text in texts)
        for box in (x.get_window_extent() for x in texts if x.get_visible() and x.get_text()):
            assert -2 <= box.x0 and box.x1 <= figure.bbox.width + 2
            assert -2 <= box.y0 and box.y1 <= figure.bbox.height + 2


def test_files_have_the_same_bytes_whatever_the_user_s_style(group, tmp_path):
    first = plots.draw([group], tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 30}):
        assert plots.draw([group], tmp_path) == first
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    assert len(files) == 3 and max(map(len, files.values())) < 150_000


def test_no_plot_takes_another_s_file(tmp_path):
    """Two budgets of one model, and a model whose own name ends as the second's file would."""
    made = []
    for model, epochs in (("bert", 1), ("bert", 2), ("bert-2", 1), ("BERT_2", 1)):
        made.append(make_result(settings={"epochs": epochs}) | {"model": model})
        made[-1]["base"] = {"sha256": model}
    drawn = plots.draw(judged(tmp_path, *made), tmp_path)
    files = {file for _, costs in drawn for file, _ in costs}
    assert len(files) == len(drawn) == 4


def test_little_data_gives_few_plots_and_no_error(tmp_path):
    lost = [make_result("lora", 0, lr, diverged=True) for lr in (1e-3, 2e-3)]
    (group,) = judged(tmp_path, make_result("hira", 0), *lost)
    [(scores, costs)] = plots.draw([group], tmp_path)
    assert not scores and [file for file, _ in costs] == ["sst2-minilm-memory.png"]
