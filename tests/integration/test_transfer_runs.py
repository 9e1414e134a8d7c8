"""New runs that start from the weights of an earlier model."""

import hashlib
import json
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs_of_version_0_1 import ARCHIVE, COMMON
from tiny_runs import TINY, differing, losses, trainer, weights

from orion_unet import checkpoint
from orion_unet.config import TrainConfig
from orion_unet.errors import InputError
from orion_unet.evaluation.known_cores import recognise_cores
from orion_unet.inference.model import load_trained
from orion_unet.training.loop import Loop
from orion_unet.training.loop import train as train_run

pytestmark = pytest.mark.slow

NAMES = ("Hoechst", "CD3", "CD20")


@pytest.fixture
def source(pairs, train):
    """A finished run on named markers, with averaged weights."""
    (pairs / "channel_names.txt").write_text("\n".join(NAMES))
    return train("source", ema_decay=0.9)


@pytest.fixture
def others(write_pairs):
    """Pairs of another panel, which shares two markers at other positions."""
    folder = write_pairs("others", cores=4, size=(80, 72), channels=3, seed=1)
    for index, path in enumerate(sorted(folder.glob("*_ORION.npy"))):
        np.save(path, np.load(path) // (4 - index))
    (folder / "channel_names.txt").write_text("CD20\nSMA\nHoechst")
    return folder


@pytest.fixture
def built(train, monkeypatch):
    """The state of a run before its first step."""

    def build(**options):
        found = []

        def note(self):
            found.append(SimpleNamespace(state=self.state, config=self.config))
            return 0

        with monkeypatch.context() as patched:
            patched.setattr(Loop, "run", note)
            train("built", **options)
        return found[0]

    return build


def started_from(run_dir):
    return json.loads((run_dir / "config.json").read_text())["started_from"]


@pytest.mark.parametrize("given", [".", "checkpoints/best.pt", "checkpoints/last.pt"])
def test_a_new_run_starts_with_the_weights_that_prediction_uses(given, source, built):
    path = source.dir / given
    made = built(init_from=str(path), seed=7)
    expected = load_trained(path, "cpu").network.state_dict()
    assert differing(made.state.model.state_dict(), expected) == []
    if given.endswith("last.pt"):
        assert differing(expected, weights(source.dir, "last.pt", "ema")) == []
        assert differing(expected, weights(source.dir, "last.pt", "model")) != []
    # Nothing else is continued.
    assert (made.state.epoch, made.state.step, made.state.early_stopping.best) == (0, 0, None)
    assert not made.state.learner.optimizer.state


def test_the_run_records_and_reports_what_it_took(source, others, train):
    made = train("tuned", pairs_dir=str(others), init_from=str(source.dir), ema_decay=0.9)
    assert made.code == 0
    best = source.dir / "checkpoints" / "best.pt"
    record = started_from(made.dir)
    assert record["path"] == str(best.resolve())
    assert record["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert record["markers"] == {"CD20": "CD20", "SMA": None, "Hoechst": "Hoechst"}
    assert record["dropped"] == ["CD3"]
    assert "trained_on" not in record
    stored = checkpoint.load(made.dir / "checkpoints" / "best.pt")
    assert {name: stored["started_from"][name] for name in record} == record
    log = (made.dir / "train.log").read_text()
    assert f"started from    {best.resolve()}, epoch" in log
    assert "head          2 of 3 markers by name; new: SMA; dropped: CD3" in log
    # Normalisation and split are the new run's own.
    assert stored["channel_names"] == ["CD20", "SMA", "Hoechst"]
    assert stored["normalization"] != checkpoint.load(best)["normalization"]


def test_a_run_without_a_source_records_none(train):
    assert started_from(train("scratch", epochs=1).dir) is None


def test_cores_of_the_first_training_do_not_count_as_held_out(source, others, pairs, train, open_pairs):
    tuned = train("tuned", pairs_dir=str(others), init_from=str(source.dir), epochs=1)
    # Through a second generation, too.
    again = train("again", pairs_dir=str(others), init_from=str(tuned.dir), epochs=1)
    (table,) = (open_pairs(pairs).table,)
    trained = {row["core"] for row in checkpoint.load(source.dir / "checkpoints" / "best.pt")["split"]["train"]}
    for run in (tuned, again):
        known = recognise_cores(load_trained(run.dir, "cpu"), table, None)
        assert known.train.tolist() == []
        assert {str(table.names[core]) for core in known.val} == {str(name) for name in table.names} - trained
        assert "3 cores were not trained on here, but by the model that this one started from" in known.warnings[0]


def test_a_validation_core_that_the_source_was_trained_on_is_named(source, train, capsys):
    split = json.loads((source.dir / "split.json").read_text())
    split["train"][0], split["val"][0] = split["val"][0], split["train"][0]
    swapped = source.dir / "swapped.json"
    swapped.write_text(json.dumps(split))
    sentence = "--init_from: the source was trained on 1 of this run's 1 validation cores"
    train("same_split", init_from=str(source.dir), split_file=str(source.dir / "split.json"), epochs=1)
    assert sentence not in capsys.readouterr().out
    train("swapped", init_from=str(source.dir), split_file=str(swapped), epochs=1)
    shown = capsys.readouterr().out
    assert f"{sentence}, so their scores flatter this run: {split['val'][0]['core']}\n" in shown


def test_an_interrupted_run_continues_to_the_same_weights_without_its_source(source, others, train, killed_in_epoch_2):
    options = {"pairs_dir": str(others), "init_from": str(source.dir), "ema_decay": 0.9}
    straight = train("straight", **options)
    with killed_in_epoch_2():
        train("run", **options, resume="auto")
    before = started_from(straight.dir)
    shutil.rmtree(source.dir)
    made = train("run", **options, resume="auto")
    assert losses(made.dir) == losses(straight.dir)
    for name, part in (("last.pt", "model"), ("last.pt", "ema"), ("best.pt", "model")):
        assert differing(weights(made.dir, name, part), weights(straight.dir, name, part)) == []
    assert started_from(made.dir) == before


def test_a_resumed_run_says_that_it_does_not_read_another_model(source, train, capsys):
    train("run", epochs=1)
    made = train("run", epochs=2, resume="auto", init_from=str(source.dir))
    assert f"note: --init_from {source.dir} is not read" in capsys.readouterr().out
    assert started_from(made.dir) is None


def test_a_model_of_version_0_1_can_be_the_start(tmp_path, built):
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path / "old")
    old = tmp_path / "old" / "complete"
    shape = {"base_features": COMMON["base_features"], "depth": COMMON["depth"], "use_boundary_guidance": True}
    made = built(init_from=str(old), **shape, channel_names="C2,Hoechst,new")
    expected = weights(old, "best.pt")
    state = made.state.model.state_dict()
    for row, theirs in ((0, 2), (1, 0)):
        assert torch.equal(state["head.weight"][row], expected["head.weight"][theirs])
    assert not state["head.weight"][2].any()
    assert {name for name in differing(state, expected) if not name.startswith("head")} == set()


def test_part_of_another_network_is_taken_where_asked_for(source, built):
    made = built(init_from=str(source.dir), init_partial=True, depth=3, norm="group", use_boundary_guidance=True)
    parts = made.state.origin["parts"]
    assert parts["encoder"] == {"taken": [0, 1, 2], "in_part": [], "new": [3]}
    assert parts["decoder"] == {"taken": [0, 1], "in_part": [], "new": [2]}


def test_with_a_part_the_panels_need_not_share_a_marker(source, built):
    made = built(init_from=str(source.dir), init_partial=True, channel_names="A,B,C")
    assert made.state.origin["markers"] == {"A": None, "B": None, "C": None}
    assert not made.state.model.head.weight.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_from": "absent"}, r"--init_from absent: cannot be read \(No such file or directory\)"),
        ({"init_from": "empty_folder"}, r"--init_from empty_folder/checkpoints/best.pt: cannot be read"),
        ({"init_from": "text.pt"}, "--init_from text.pt: is damaged or not a checkpoint"),
        ({"init_from": "other.pt"}, "--init_from other.pt: is not a checkpoint of this toolkit"),
        ({"channel_names": "A,B,C"}, "predicts Hoechst, CD3, CD20 and none of this run's markers"),
        (
            {"depth": 3, "base_features": 6, "use_boundary_guidance": True},
            "its network has --base_features 4 --depth 2 --no_use_boundary_guidance, this run's has --base_features 6 "
            "--depth 3 --use_boundary_guidance; use the same, because no layer fits another --base_features",
        ),
        (
            {"norm": "group"},
            "its network has --norm batch, this run's has --norm group; use the same, or add --init_part",
        ),
        ({"base_features": 6, "init_partial": True}, "use the same, because no layer fits another --base_features"),
        ({"norm": "group", "init_partial": True, "encoder_train": "last"}, "--encoder_train last would keep random"),
        ({"depth": 3, "init_partial": True, "encoder_train": "frozen"}, "--encoder_train frozen would keep random"),
        ({"init_from": None, "encoder_train": "frozen"}, "would keep random weights, because this run starts from no"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_in_one_sentence(
    options, message, source, train, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=message) as error:
        train("refused", **{"init_from": str(source.dir), **options})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()


def test_the_command_ends_with_2_and_writes_nothing(pairs, call, tmp_path):
    ended = call(*trainer(pairs_dir=pairs, output_dir="refused", init_from="absent.pt"))
    assert ended.code == 2
    assert ended.err == "error: --init_from absent.pt: cannot be read (No such file or directory)\n"
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("ranks", [2])
def test_ranks_start_alike_and_an_interrupted_run_continues_to_the_same_weights(ranks, source, others, train_on_ranks):
    options = {**TINY, "pairs_dir": str(others), "init_from": str(source.dir), "batch_size": 1, "ema_decay": 0.9}
    run, straight = train_on_ranks(ranks, options)
    assert losses(run) == losses(straight)
    assert differing(weights(run), weights(straight)) == []
    assert started_from(run) == started_from(straight)
    assert started_from(run)["markers"] == {"CD20": "CD20", "SMA": None, "Hoechst": "Hoechst"}


def stage_of(name, depth=TINY["depth"]):
    """The encoder's stage of a tensor, from 0 at full resolution; None for decoder and head."""
    part, number, *_ = name.split(".")
    return {"encoder": int(number), "bottleneck": depth}.get(part) if part in ("encoder", "bottleneck") else None


@pytest.mark.parametrize(("how", "first_that_trains"), [("full", 0), ("last", TINY["depth"]), ("frozen", 99)])
def test_what_is_frozen_keeps_every_bit_and_all_else_moves(how, first_that_trains, source, others, train):
    before = weights(source.dir, "best.pt")
    made = train("tuned", pairs_dir=str(others), init_from=str(source.dir), encoder_train=how, ema_decay=0.9)
    for stored in (weights(made.dir), weights(made.dir, "last.pt", "ema"), weights(made.dir, "best.pt")):
        moved = {name for name in stored if stage_of(name) is not None and not torch.equal(stored[name], before[name])}
        assert moved == {name for name in stored if stage_of(name) is not None and stage_of(name) >= first_that_trains}
        decoder = [name for name in stored if name.startswith("decoder")]
        assert not any(torch.equal(stored[name], before[name]) for name in decoder)
    config = json.loads((made.dir / "config.json").read_text())
    frozen = {"full": [], "last": ["encoder"], "frozen": ["encoder", "bottleneck"]}[how]
    kept = [
        name for name, _ in load_trained(made.dir, "cpu").network.named_parameters() if name.split(".")[0] in frozen
    ]
    assert config["frozen_parameters"] == sum(before[name].numel() for name in kept)
    said = (made.dir / "train.log").read_text().count("which keeps its weights and the statistics of its norms")
    assert said == (0 if how == "full" else 1)


@pytest.mark.parametrize(
    "options", [{"encoder_train": "frozen"}, {"encoder_train": "last", "encoder_rate_factor": 0.2}, {"norm": "group"}]
)
@pytest.mark.parametrize("ranks", [2])
def test_partly_frozen_ranks_continue_bit_for_bit(options, ranks, train, others, train_on_ranks):
    shape = {"norm": options["norm"]} if "norm" in options else {}
    first = train("first", **shape, epochs=1, channel_names="Hoechst,CD3,CD20")
    given = {
        **TINY,
        "pairs_dir": str(others),
        "init_from": str(first.dir),
        "batch_size": 1,
        "ema_decay": 0.9,
        "encoder_train": "frozen",
        **options,
    }
    run, straight = train_on_ranks(ranks, given)
    assert losses(run) == losses(straight)
    stored = weights(run)
    assert differing(stored, weights(straight)) == []
    kept = [name for name in stored if stage_of(name) is not None and stage_of(name) < TINY["depth"]]
    before = weights(first.dir, "best.pt")
    assert kept
    assert all(torch.equal(stored[name], before[name]) for name in kept)


def test_the_recipe_of_fine_tuning_needs_a_model_to_start_from(pairs, tmp_path):
    options = {"pairs_dir": str(pairs), "output_dir": str(tmp_path / "refused")}
    with pytest.raises(InputError, match="--recipe fine_tune: needs a model to start from; name its run with --init_"):
        train_run(TrainConfig.from_options(options, "fine_tune"))
    assert not (tmp_path / "refused").exists()


def test_another_encoder_training_is_refused_when_a_run_is_resumed(source, train):
    options = {"init_from": str(source.dir), "encoder_train": "frozen", "encoder_rate_factor": 0.5}
    made = train("run", **options, epochs=1)
    assert "--encoder_rate_factor 0.5 has no effect" in (made.dir / "train.log").read_text()
    with pytest.raises(InputError, match="--encoder_train: frozen in the run, full now"):
        train("run", **{**options, "encoder_train": "full"}, epochs=2, resume="auto")
    assert train("run", **options, epochs=2, resume="auto").code == 0


def test_the_encoder_has_a_rate_of_its_own(built):
    groups = built(encoder_rate_factor=0.25, weight_decay=0.3).state.learner.optimizer.param_groups
    assert [(group["rate_factor"], group["weight_decay"]) for group in groups] == [
        (1.0, 0.3), (1.0, 0.0), (0.25, 0.3), (0.25, 0.0)
    ]  # fmt: skip


def test_a_slow_encoder_moves_in_its_first_step_by_the_factor(train):
    """Adam's first step moves every weight by the learning rate, whatever its gradient."""
    options = {"epochs": 1, "patches_per_image": 2, "batch_size": 6, "weight_decay": 0.0, "grad_clip": 0.0}
    plain = weights(train("plain", **options, learning_rate=1e-3).dir)
    still = weights(train("still", **options, learning_rate=1e-12).dir)
    slow = weights(train("slow", **options, learning_rate=1e-3, encoder_rate_factor=0.25).dir)
    for name, factor in (("encoder.0.0.weight", 0.25), ("bottleneck.0.3.weight", 0.25), ("decoder.0.up.weight", 1.0)):
        moves = (slow[name] - still[name]).abs().median() / (plain[name] - still[name]).abs().median()
        assert moves.item() == pytest.approx(factor, rel=1e-2)


def test_the_upsampling_of_the_source_and_of_a_run_to_resume_is_kept(train):
    source = train("source", upsampling="transposed", epochs=1)
    assert load_trained(source.dir, "cpu").config.model.upsampling == "transposed"
    tuned = train("tuned", init_from=str(source.dir), epochs=1)
    assert tuned.code == 0
    assert load_trained(tuned.dir, "cpu").config.model.upsampling == "transposed"
    assert load_trained(train("fresh", epochs=1).dir, "cpu").config.model.upsampling == "bilinear"
    with pytest.raises(InputError, match="its network has --upsampling transposed, this run's has --upsampling biline"):
        train("other", init_from=str(source.dir), upsampling="bilinear", epochs=1)
    # Runs made before the option existed had transposed convolutions.
    last = source.dir / "checkpoints" / "last.pt"
    content = torch.load(last, weights_only=True)
    del content["options"]["upsampling"]
    torch.save(content, last)
    assert load_trained(last, "cpu").config.model.upsampling == "transposed"
    assert train("source", upsampling=None, epochs=2, resume="auto").code == 0
    assert load_trained(source.dir, "cpu").config.model.upsampling == "transposed"
