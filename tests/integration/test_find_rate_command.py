"""find-rate on tiny pairs: what it writes, what it leaves alone, what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TINY, command_line

from orion_unet.cli.arguments import run_command
from orion_unet.cli.find_rate import main
from orion_unet.training import find_rate as module
from orion_unet.training.engine import Step

pytestmark = pytest.mark.slow


@pytest.fixture
def find(pairs, tmp_path, capsys):
    """Run find-rate in this process; exit code, output folder, what was printed."""

    def run(name="rate", steps=30, **options):
        given = {**TINY, "batch_size": 6, "pairs_dir": pairs, "output_dir": tmp_path / name, "steps": steps, **options}
        code = run_command(main, ["--recipe", "none", *command_line({k: v for k, v in given.items() if v is not None})])
        shown = capsys.readouterr()
        return code, tmp_path / name, shown.out, shown.err

    return run


def document(folder):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "find_rate.json").read_text(encoding="utf-8"), parse_constant=refuse)


def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_test_writes_its_curve_and_the_line_to_paste(find):
    code, folder, out, _ = find()
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["find_rate.json", "find_rate.png"]
    found = document(folder)
    rates = np.geomspace(1e-5, 1e-1, 30)
    np.testing.assert_allclose(found["rates"], rates[: len(found["rates"])])
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"])
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert found["suggestion"]["rate"] in found["rates"]
    assert out.splitlines()[-1] == f"--learning_rate {found['suggestion']['rate']:.2g}"
    assert found["options"]["batch_size"] == 6 and "learning_rate" not in found["options"]
    assert (folder / "find_rate.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_loss_is_that_of_a_training_of_the_same_options(find, train):
    _, folder, _, _ = find()
    steps = train("run", epochs=1, batch_size=6, log_every_steps=1).dir / "steps.jsonl"
    first = json.loads(steps.read_text(encoding="utf-8").splitlines()[0])
    assert document(folder)["losses"][0] == first["loss"]


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(find):
    same = [document(find(name)[1])["losses"] for name in ("first", "second")]
    assert same[0] == same[1]
    assert document(find("third", seed=7)[1])["losses"] != same[0]


def test_accumulated_batches_make_one_step_at_one_rate(find):
    plain, folder = document(find()[1])["losses"], find("accumulated", accumulate_steps=2)[1]
    losses = document(folder)["losses"]
    assert len(losses) <= 30
    # At the lowest rate nothing has moved yet: the first step sees the first two batches of the plain test.
    assert losses[0] == pytest.approx((plain[0] + plain[1]) / 2, rel=1e-3)


@pytest.mark.parametrize("last", [0, 20])
def test_a_loss_that_is_not_finite_ends_the_test(last, find, monkeypatch):
    steps = module.train_steps

    def spoiled(*args, **kwargs):
        for done in steps(*args, **kwargs):
            yield done if done.step < last else Step(done.step, math.nan, bad=True)

    monkeypatch.setattr(module, "train_steps", spoiled)
    _, folder, out, _ = find()
    found = document(folder)
    assert (found["stopped"], len(found["losses"])) == ("not_finite", last)
    assert found["diverged_rate"] == pytest.approx(np.geomspace(1e-5, 1e-1, 30)[last])
    assert found["suggestion"]["tenth_of_diverged"] == pytest.approx(found["diverged_rate"] / 10)
    assert f"{last} of 30 steps" in out and "was not finite" in out


def test_a_network_that_cannot_learn_gets_no_rate_and_exit_code_1(find):
    code, folder, out, _ = find(lowest_rate=1e-12, highest_rate=1e-10)
    assert code == 1
    assert document(folder)["suggestion"]["rate"] is None
    assert "no suggestion" in out and "--learning_rate 1" not in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"lowest_rate": 0.1, "highest_rate": 0.01}, "--lowest_rate 0.1 is not below --highest_rate 0.01"),
        ({"steps": 3}, "--steps 3"),
        ({"highest_rate": 2.0}, "--highest_rate 2.0"),
        ({"batch_size": 999}, "--batch_size"),
        ({"pairs_dir": "nowhere"}, "nowhere"),
        ({"resume": "auto"}, "--resume auto"),
        ({"gpus": 2}, "--gpus 2"),
        ({"output_dir": None}, "--output_dir is missing"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(options, culprit, find, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    code, folder, out, err = find(**options)
    assert code == 2
    assert culprit in err and err.count("error: ") == 1
    assert not folder.exists() and content(tmp_path) == before
    assert out == ""


def test_a_run_folder_is_refused_and_not_touched_even_with_overwrite(find, train):
    made = train("run", epochs=1)
    before = content(made.dir)
    for more in ({}, {"overwrite": True}):
        code, _, _, err = find("run", **more)
        assert code == 2 and "holds a training run" in err
    assert content(made.dir) == before


def test_an_earlier_test_is_only_replaced_when_asked(find):
    find()
    code, folder, _, err = find(seed=7)
    assert code == 2 and "--overwrite" in err
    assert document(folder)["options"]["seed"] == TINY.get("seed", 42)
    assert find(seed=7, overwrite=True)[0] != 2
    assert document(folder)["options"]["seed"] == 7


def test_the_random_state_of_torch_does_not_matter(find):
    torch.manual_seed(1)
    first = document(find("first", dropout=0.5)[1])["losses"]
    torch.manual_seed(2)
    assert document(find("second", dropout=0.5)[1])["losses"] == first
