"""Run folders for the monitor's tests, written as a trainer writes them but without one."""

import json
import math

MARKERS = ("Hoechst", "CD45", "Pan-CK", "Blank")


def epoch_record(epoch, train, val, lr=1e-4, attempt=1, markers=MARKERS):
    """One line of metrics.jsonl; the marker Blank is constant and has no correlation."""
    channels = {
        name: {"pearson": None if name == "Blank" else round(0.9 - 0.1 * at, 3), "mae": 0.04, "ssim": 0.5}
        for at, name in enumerate(markers)
    }
    return {
        "schema": 1,
        "epoch": epoch,
        "attempt": attempt,
        "time": "2026-01-31T10:00:00Z",
        "duration_s": 40.0,
        "lr": lr,
        "train": {"loss": train, "terms": {"mse": train, "l1": train, "focal": None}},
        "val": {
            "loss": val,
            "terms": {"mse": val, "l1": val, "focal": val},
            "metrics": {"pearson": 0.6, "mae": 0.05, "psnr_db": 21.0, "ssim": 0.5, "pearson_markers": 3},
            "per_channel": channels,
        },
        "grad_norm": 0.9,
        "samples_per_s": 210.0,
        "skipped_steps": 0,
        "best": False,
    }


def step_record(epoch, step, loss, attempt=1, **more):
    """One line of steps.jsonl."""
    return {
        "schema": 1,
        "epoch": epoch,
        "step": step,
        "attempt": attempt,
        "time": "2026-01-31T10:00:00Z",
        "loss": loss,
        "lr": 1e-4,
        "grad_norm": 0.9,
        "samples_per_s": 210.0,
        "data_wait_fraction": 0.02,
        "skipped_steps": 0,
        "non_finite_steps": 0,
        **more,
    }


def write_steps(folder, records):
    """Write steps.jsonl."""
    (folder / "steps.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def healthy_losses(epochs):
    """Training and validation losses of a calm run."""
    return (
        [0.08 + 0.3 * math.exp(-e / 7) for e in range(epochs)],
        [0.09 + 0.32 * math.exp(-e / 7) + 0.001 * (-1) ** e for e in range(epochs)],
    )


def former_losses():
    """The run this project began with: V jumps from 0.43 to 0.54, L gains 0.077 in 20 epochs, the gap is 0.14."""
    jumps = (0.47, 0.53, 0.44, 0.52, 0.48, 0.54, 0.43, 0.50, 0.53, 0.45, 0.49, 0.54, 0.46, 0.44, 0.52, 0.47)
    train = [0.42 - 0.077 * e / 19 for e in range(20)]
    return train, [*jumps, 0.54, 0.43, 0.51, 0.48]


def write_run(folder, train, val, state="finished", options=None, **status):
    """A run folder with these losses."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(epoch_record(e, t, v)) for e, (t, v) in enumerate(zip(train, val, strict=True), 1)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    defaults = {"epochs": 30, "learning_rate": 1e-4, "val_split": 0.2, "early_stopping_patience": 10}
    config = {"schema": 1, "options": {**defaults, **(options or {})}, "world_size": 1, "global_batch": 12}
    config["empty_channels"] = ["Blank"]
    (folder / "config.json").write_text(json.dumps(config))
    document = {"schema": 1, "state": state, "epoch": len(train), "epochs": 30, "message": "", **status}
    (folder / "status.json").write_text(json.dumps(document))
    return folder
