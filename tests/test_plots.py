"""The pictures: what is drawn is what was given; one colour and marker a method; the same bytes."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_compare import judged, make_result, make_study

from harness import plots

GAINS = {"lora": 0, "qlora": 0, "hira": 6, "sparse_lora": 0.7, "lora-rank32": 1}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    made = make_study(GAINS, seeds=6, timed=True)
    for result in made:
        if result["name"] == "lora-rank32":
            result["parameters"]["trainable"] = 295_682
    right = np.arange(400) % 2 > 0
    for seed in range(6):
        for rate in (1e-3, 2e-3):
            made.append(make_result("head_only", seed, rate, correct=right, timed=True))
    (found,) = judged(tmp_path_factory.mktemp("study"), *made)
    return found


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: kept.append(self))
    return kept


def lines_of(axes):
    return [np.array(line.get_xydata()) for line in axes.get_lines()]


def has(lines, points):
    points = np.array(points, float)
    return any(x.shape == points.shape and np.allclose(x, points) for x in lines)


def rows_of(group):
    return {row["label"]: row for row in group["rows"]}


def test_the_forest_shows_mean_intervals_seeds_and_margin(group, figures):
    assert plots.forest(group, "forest.png")
    (axes,) = figures[0].axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["Sparse LoRA", "HiRA", "QLoRA", "LoRA rank32"]
    lines = lines_of(axes)
    for y, label in enumerate(labels):
        pair = rows_of(group)[label]["beside"]
        assert has(lines, [[pair["mean"], y]])
        for key in ("both", "seeds"):
            assert has(lines, [[x, y] for x in pair["intervals"][key]])
        assert any(np.allclose(line[:, 0], pair["each"]) for line in lines if len(line) == 6)
    band = axes.patches[0]
    assert (band.get_x(), band.get_width()) == (-1, 2)
    assert (
        "HiRA better than LoRA; QLoRA within 1 point of LoRA; Sparse LoRA undecided"
        in figures[0].texts[0].get_text()
    )


def test_the_rates_show_mean_and_range_over_seeds_a_panel_a_method(group, figures):
    assert plots.rates(group, "rates.png")
    panels = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["LoRA", "QLoRA", "HiRA", "Sparse LoRA"]
    for axes in panels:
        row = rows_of(group)[axes.get_title()]
        means = [np.mean(scores) for scores in row["dev"].values()]
        assert axes.get_xscale() == "log"
        assert has(lines_of(axes), np.transpose([row["rates"], means]))
        band = axes.collections[0].get_paths()[0].vertices
        scores = list(row["dev"].values())
        assert band[:, 1].min() == pytest.approx(np.min(scores))
        assert band[:, 1].max() == pytest.approx(np.max(scores))


def test_memory_is_stacked_by_its_parts_and_adds_up(group, figures):
    assert plots.memory(group, "memory.png")
    (axes,) = figures[0].axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [row["label"] for row in group["rows"]]
    widths = np.array([[bar.get_width() for bar in bars] for bars in axes.containers])
    assert widths[:, 0] == pytest.approx([100, 12.5, 37.5, 50])
    assert widths.sum(0) == pytest.approx([200] * len(labels))
    starts = np.array([[bar.get_x() for bar in bars] for bars in axes.containers])
    assert starts == pytest.approx(np.cumsum(widths, 0) - widths)


def test_the_title_of_memory_names_the_least_of_the_adapters(figures, tmp_path):
    made = make_study({"lora": 0, "qlora": 0}, seeds=2, timed=True)
    right = np.arange(400) % 2 > 0
    for seed in range(2):
        made.append(make_result("head_only", seed, 1e-3, correct=right, timed=True))
    for result in made:
        less = {"head_only": 0, "qlora": 40, "lora": 90}[result["name"]]
        result["memory"]["train"]["frozen weights"] = less * 2**20
    assert plots.memory(*judged(tmp_path, *made), "memory.png")
    assert "QLoRA needs the least memory of the adapters: 140 MiB" in figures[0].texts[0].get_text()


def test_the_score_stands_over_the_trained_weights(group, figures):
    assert plots.weights(group, "weights.png")
    (axes,) = figures[0].axes
    points = {line.get_label(): line.get_xydata()[0] for line in axes.get_lines()[1::2]}
    for label, (x, y) in points.items():
        row = rows_of(group)[label]
        assert y == pytest.approx(row["score"])
        assert x == pytest.approx(row["costs"]["parameters.trainable"], rel=0.1)
    assert points["LoRA rank32"][0] == pytest.approx(295_682)
    spots = [tuple(point) for point in points.values()]
    assert len(set(spots)) == len(spots) == 5


def test_times_are_drawn_where_runs_were_timed(group, figures, tmp_path):
    assert plots.speed(group, "speed.png")
    seconds, ratio = figures[0].axes
    assert has(lines_of(seconds), [[60, 0]]) and has(lines_of(ratio), [[1, 0]])
    (untimed,) = judged(tmp_path, *make_study({"lora": 0, "hira": 0}))
    assert plots.speed(untimed, "speed.png") is None


def test_a_method_has_one_colour_and_one_marker_everywhere(group, figures):
    seen = {}
    for kind in (plots.forest, plots.rates, plots.weights, plots.speed):
        kind(group, "x.png")
    for figure in figures:
        for axes in figure.axes:
            for line in axes.get_lines():
                if line.get_marker() not in ("None", ".", None):
                    seen.setdefault(line.get_color(), set()).add(line.get_marker())
    assert {colour: found.pop() for colour, found in seen.items() if len(found) == 1} == {
        colour: marker for colour, marker in plots.LOOKS.values() if colour in seen
    }
    colours, markers = zip(*plots.LOOKS.values(), strict=True)
    assert len(set(colours)) == len(set(markers)) == len(plots.LOOKS)


def test_a_variant_has_its_method_s_colour_and_a_hollow_marker(group):
    rows = rows_of(group)
    plain, variant = plots.look(rows["LoRA"]), plots.look(rows["LoRA rank32"])
    assert plain["color"] == variant["color"] == plain["mfc"] and variant["mfc"] == "none"


def test_perplexity_says_that_left_is_better(tmp_path, figures):
    (group,) = judged(tmp_path, *make_study({"lora": 0, "hira": 9}, lm=True))
    plots.forest(group, "forest.png")
    (axes,) = figures[0].axes
    assert "percent of the perplexity (left is better)" in axes.get_xlabel()
    assert axes.patches[0].get_width() == 4


def test_files_have_the_same_bytes_whatever_the_user_s_style(group, tmp_path):
    groups = [group, group]
    first = plots.draw(groups, tmp_path)
    assert len({file for pictures in first for file, _ in pictures}) == 10
    bytes_ = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 30}):
        assert plots.draw(groups, tmp_path) == first
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == bytes_
    assert max(map(len, bytes_.values())) < 150_000


def test_little_data_gives_few_pictures_and_no_error(tmp_path):
    (group,) = judged(tmp_path, make_result("lora", 0))
    (pictures,) = plots.draw([group], tmp_path)
    assert [file for file, _ in pictures] == ["sst2-minilm-memory.png"]
