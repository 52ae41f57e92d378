"""The table of results: what stands in it follows from the runs' own files."""

import csv
import dataclasses
import json
import shlex
import statistics

import pytest

import markdown_tables
import table
from capsjax.networks._config_json import config_to_json
from capsjax.run.command_line import parse
from capsjax.run.settings import Settings, to_json

SHAPE = (28, 28, 1)


def complete(experiment: str, settings: Settings) -> Settings:
    """Completes settings as a run does."""
    preset = table.EXPERIMENTS[experiment].presets[settings.recipe.preset]
    training = preset.complete(settings.training, SHAPE)
    return dataclasses.replace(settings, training=training)


def parse_words(experiment: str, words: list[str]) -> Settings:
    """Reads a command line and completes it."""
    return complete(experiment, parse(words, table.EXPERIMENTS[experiment]))


def write_run(
    folder, settings: Settings, errors: list[float], *, experiment: str = "mnist"
) -> None:
    """Writes what the table reads of a run's folder."""
    folder.mkdir(parents=True)
    network = table.EXPERIMENTS[experiment].presets[settings.recipe.preset].network
    config = {
        "settings": to_json(settings),
        "network": config_to_json(network),
        "image_shape": SHAPE,
        "device": "1 × cpu (cpu)",
        "processor": "Abacus",
        "cores": 1,
        "git": "abc1234",
        "versions": {"jax": "0.12"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["epoch", "test_error", "validation_error", "seconds"])
        rows.writeheader()
        for epoch, error in enumerate(errors, 1):
            row = {"epoch": epoch, "test_error": error, "validation_error": 9, "seconds": 100}
            rows.writerow(row)


def test_a_row_holds_the_last_epoch_of_each_seed_their_mean_and_standard_deviation(tmp_path):
    tmp_path /= "mnist"
    last = {0: 0.31, 2: 0.25, 10: 0.4}
    for seed, error in last.items():
        words = ["--preset", "best", "--epochs", "3", "--seed", str(seed)]
        errors = [0.9, 0.2, error]  # the middle is the best and does not count
        write_run(tmp_path / "best" / str(seed), parse_words("mnist", words), errors)
    write_run(tmp_path / "alone" / "0", parse_words("mnist", ["--epochs", "1"]), [0.1])
    made = markdown_tables.make_table(table.COLUMNS, table.make_rows(table.read_results(tmp_path)))
    mean, spread = statistics.mean(last.values()), statistics.stdev(last.values())
    machine = "1 core of Abacus, JAX 0.12, commit abc1234"
    assert made.splitlines()[2:] == [
        "| alone | `capsnet`, `agreement` | 8,215,568 "
        "| `python experiments/mnist.py --seed 0 --epochs 1` | 0.10 | 0.10 | 1 × 100 s "
        f"| {machine} |",
        "| best | `capsnet`, `agreement` | 8,215,568 "
        "| `python experiments/mnist.py --preset best --seed 0 --epochs 3` "
        f"| {mean:.3f} ± {spread:.3f} | 0.31, 0.25, 0.40 | 3 × 100 s | {machine} |",
    ]


def test_a_row_tells_every_machine_and_commit_of_its_runs(tmp_path):
    for seed, changed in enumerate(({}, {"git": "def5678"}, {"cores": 2}, {"git": None})):
        folder = tmp_path / "mnist" / "one" / str(seed)
        write_run(folder, parse_words("mnist", ["--epochs", "1", "--seed", str(seed)]), [0.1])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))
    (row,) = table.make_rows(table.read_results(tmp_path / "mnist"))
    machines = "1 core of Abacus, JAX 0.12 and 2 cores of Abacus, JAX 0.12"
    assert row["machine"] == f"{machines}, commit abc1234, def5678, unknown"


def test_an_ensemble_has_a_row_with_its_command(tmp_path):
    test = {"weights": ["best-0", "best-1"], "test": {"error": 0.17}, "versions": {"jax": "0.12"}}
    about = {"device": "1 × gpu (NVIDIA H100)", "processor": "", "cores": 16, "git": "abc1234"}
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble" / "test.json").write_text(json.dumps(test | about))
    assert table.read_results(tmp_path) == {}
    rows = [table.make_test_row(test) for test in table.read_tests(tmp_path)]
    made = markdown_tables.make_table(table.COLUMNS, rows)
    assert made.splitlines()[2:] == [
        "| an ensemble "
        "| `python experiments/mnist.py --testing --weights runs/best-0 runs/best-1` | 0.17 "
        "| 1 × gpu (NVIDIA H100), JAX 0.12, commit abc1234 |"
    ]  # without the columns that no row fills


def test_a_run_that_reached_its_target_counts_and_tells_how_much_it_misread_of_what_was_held_out(
    tmp_path,
):
    for seed, epochs in ((0, 2), (1, 4)):
        line = f"--preset cnn --target 91 --seed {seed}"
        settings, errors = parse_words("affnist", line.split()), [30.0] * (epochs - 1) + [20 + seed]
        folder = tmp_path / "affnist" / "cnn" / str(seed)
        write_run(folder, settings, errors, experiment="affnist")
    (row,) = table.make_rows(table.read_results(tmp_path / "affnist"))
    assert row["data"] == "affnist"
    assert row["held out, %"] == "9.000 ± 0.000"
    assert row["error, %"] == "20.500 ± 0.707"
    assert row["epochs"] == "2 to 4 × 100 s"
    assert row["command"] == "`python experiments/affnist.py --preset cnn --seed 0 --target 91.0`"


def test_the_ablation_has_a_row_and_a_place_in_the_figure_for_each_network(tmp_path):
    for name, errors in (("random", [[3, 2.5]]), ("routings-3", [[3, 1.5], [2, 1.25]])):
        for seed, each in enumerate(errors):
            settings = table.EXPERIMENTS["ablation"].settings(name)
            changed = dataclasses.replace(settings.training, epochs=2)
            settings = dataclasses.replace(settings, training=changed)
            folder = tmp_path / "ablation" / name / str(seed)
            write_run(folder, complete("ablation", settings), each, experiment="ablation")
    results = table.read_results(tmp_path / "ablation")
    made = markdown_tables.make_table(table.ABLATION_COLUMNS, table.make_rows(results))
    machine = "1 core of Abacus, JAX 0.12, commit abc1234"
    assert made.splitlines()[2:] == [
        f"| routings-3 | 1.375 ± 0.177 | 1.50, 1.25 | 2 × 100 s | {machine} |",
        f"| random | 2.50 | 2.50 | 2 × 100 s | {machine} |",
    ]
    (axes,) = table.draw_ablation(results).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["routings-3", "random"]
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "."]
    assert dots == [[1.5, 1.25], [2.5]]


def test_other_data_are_named_and_their_classes_counted(tmp_path):
    settings = parse_words("mnist", ["--dataset", "clipart", "--epochs", "1"])
    folder = tmp_path / "other_data" / "clipart" / "0"
    write_run(folder, settings, [40.0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_classes": 5}))
    (row,) = table.make_rows(table.read_results(tmp_path / "other_data"))
    assert row["data"] == "clipart"
    fewer = 5 * (1152 * 16 * 8 + 16 * 512)  # W and the decoder's first layer
    assert row["parameters"] == f"{8_215_568 - fewer:,}"


def test_a_run_that_has_not_ended_does_not_count(tmp_path):
    write_run(tmp_path / "seed" / "0", parse_words("mnist", ["--epochs", "3"]), [0.9, 0.8])
    with pytest.raises(ValueError, match="2 of 3 epochs; only a whole run counts"):
        table.read_results(tmp_path)


@pytest.mark.parametrize(
    ("experiment", "line"),
    [
        ("mnist", "--epochs 1"),
        ("mnist", "--preset best --precision bfloat16 --seed 3 --epochs 20 --routings 1"),
        ("mnist", "--preset best --lam-recon 0 --rotation 10 --average 0.99"),
        ("mnist", "--preset paper --epochs 50 --shift-pixels 1.5 --validation 10000"),
        ("mnist", "--preset paper"),
        ("mnist", "--preset efficient --epochs 3"),
        ("mnist", "--preset cnn"),
        ("mnist", "--preset best --routing uniform"),
        ("mnist", "--dataset fashion_mnist --download"),
        ("trials", "--preset gradient --validation 10000 --precision bfloat16"),
        ("multi_mnist", "--routings 1 --test-pairs 500"),
        ("multi_mnist", "--preset cnn-paper --precision bfloat16 --epochs 5"),
        ("affnist", "--preset cnn --seed 2"),
        ("affnist", "--routing uniform --target 90 --validation 5000"),
    ],
)
def test_the_command_of_a_row_gives_the_settings_of_its_run(tmp_path, experiment, line):
    settings = parse_words(experiment, shlex.split(line))
    errors = [1.0] * settings.training.epochs
    write_run(tmp_path / "0", settings, errors, experiment=experiment)
    command = table.make_command(table.read_run(tmp_path / "0", experiment))
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", f"experiments/{experiment}.py")
    assert parse_words(experiment, words) == settings
    asked = {word for word in shlex.split(line) if word.startswith("--")}
    assert {word for word in words if word.startswith("--")} == asked | {"--seed"}


def test_the_text_between_the_marks_is_replaced_and_no_other(tmp_path):
    path = tmp_path / "page.md"
    marks = {n: (markdown_tables.BEGIN.format(n), markdown_tables.END.format(n)) for n in "ab"}
    parts = "".join(f"{begin}old\n{end}" for begin, end in marks.values())
    path.write_text(f"before\n{parts}after\n")
    markdown_tables.write_between_marks(path, "b", "new\n")
    parts = "{}old\n{}{}new\n{}".format(*marks["a"], *marks["b"])
    assert path.read_text() == f"before\n{parts}after\n"


@pytest.mark.parametrize("kept", ["begin", "end"])
def test_a_file_without_one_of_the_marks_is_left_as_it_is(tmp_path, kept):
    path, marks = tmp_path / "page.md", {"begin": markdown_tables.BEGIN, "end": markdown_tables.END}
    path.write_text(f"before\n{marks[kept].format('a')}after\n")
    before = path.read_text()
    with pytest.raises(SystemExit, match=r"page\.md: there is no"):
        markdown_tables.write_between_marks(path, "a", "new\n")
    assert path.read_text() == before


def test_readme_and_the_page_of_trials_hold_what_the_script_makes():
    for (path, mark), text in table.make_tables().items():
        part = f"{markdown_tables.BEGIN.format(mark)}{text}{markdown_tables.END.format(mark)}"
        assert part in path.read_text(encoding="utf-8"), (path, mark)
