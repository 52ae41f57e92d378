"""Options of an experiment: flags of its own, which its task takes and its run's folder keeps."""

import dataclasses

import pytest

from capsjax import presets
from capsjax.tasks import Classification
from tiny_run import EXPERIMENT, read_json, run_command


@dataclasses.dataclass(frozen=True)
class Options:
    """What the experiment adds."""

    doubling: int = 1
    """Times that each test image is tested."""

    def __post_init__(self):
        presets.check(self.doubling >= 1, "doubling", "1 or more", self.doubling)


@dataclasses.dataclass(frozen=True)
class Repeated(Classification):
    """A classification that tests each image several times."""

    doubling: int = 1

    def count_tests(self, images):
        return images * self.doubling

    def test_batch(self, images, labels, indices):
        return super().test_batch(images, labels, indices % len(images))


def make_task(training, options):
    return Repeated(training.lam_recon, doubling=options.doubling)


def draw(folder, model, task, dataset, rows):
    text = f"{type(model).__name__} {task.doubling} {len(dataset.y_test)} {len(rows)}"
    (folder / "drawn.txt").write_text(text)


OWN = dataclasses.replace(EXPERIMENT, make_task=make_task, options=Options(), draw=draw)


@pytest.fixture
def run(base, tmp_path):
    """Runs the experiment for an epoch."""
    return run_command(OWN, doubling=3, epochs=1, save_dir=tmp_path / "run", **base)


def test_an_option_reaches_the_task_and_the_folder_and_the_pictures(run, base, tmp_path):
    assert run.status == 0, run.err
    assert run.out.endswith("of 69)\n")  # 23 test images, three times
    assert read_json(run.folder)["settings"]["options"] == {"doubling": 3}
    assert (run.folder / "drawn.txt").read_text() == "CapsNet 3 23 1"
    resumed = run_command(OWN, resume=run.folder)
    assert resumed.out.splitlines()[-1] == run.out.splitlines()[-1]
    tested = run_command(OWN, testing=True, weights=run.folder, save_dir=tmp_path / "test")
    assert tested.out.splitlines()[-1] == run.out.splitlines()[-1]


def test_a_run_goes_on_neither_with_another_option_nor_in_another_experiment(run):
    other = run_command(OWN, resume=run.folder, doubling=2)
    assert other.status == 2
    assert "--doubling 2 beside --resume, but this run has 3" in other.err
    for flags in ({"resume": run.folder}, {"testing": True, "weights": run.folder}):
        without = run_command(**flags)
        assert without.status == 2
        assert "is the run of another experiment: use the script that began it" in without.err


def test_options_have_their_help_and_are_checked(base, capsys):
    assert "Times that each test image is tested." in run_command(OWN, help=True).out
    assert "--doubling must be 1 or more, got 0" in run_command(OWN, doubling=0, **base).err
    refused = run_command(doubling=2, **base)
    assert refused.status == 2
    assert "--doubling" in refused.err
