"""Every option of training, declared once: one dataclass per concern, which TrainConfig checks as a whole."""

from __future__ import annotations

import json
import math
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from orion_unet.errors import InputError
from orion_unet.options import option, range_problems

# Values of --encoder: our own, and the start of the name of one of timm's.
UNET, TIMM = "unet", "timm:"
# How the decoder of a new network doubles the resolution.
UPSAMPLING = "bilinear"
# Strength of a new run's stain and colour jitter, by the rule in benchmarks/stain_shift.py.
STAIN_AUGMENTATION = 0.0


@dataclass(frozen=True)
class DataOptions:
    """data: what is read, how it is split, normalised and sampled"""

    pairs_dir: str = option(
        "core_patches_npy",
        "folder of pairs NAME_HE / NAME_ORION: .npy, .ome.tif or .ome.zarr; or the URL of one on object storage "
        "(s3://bucket/folder), of .ome.zarr or .ome.tif",
        metavar="DIR",
        fixed=False,
        url=True,
    )
    val_split: float = option(0.2, "fraction of the cores held out for validation", above=0, below=1)
    fold: str | None = option(
        None,
        "hold out part K of N parts of the groups, the same parts for every K, instead of a fraction",
        metavar="K/N",
        follows=True,
    )
    split_file: str | None = option(None, "use the split of an earlier run's split.json", metavar="FILE", fixed=False)
    groups_csv: str | None = option(
        None,
        "CSV with columns core,group: whole groups (patients, slides) are held out; "
        "groups.csv in the pairs folder is used when present",
        metavar="FILE",
        fixed=False,
    )
    channel_names: str | None = option(
        None,
        "marker names in channel order, separated by commas, or a text file with one name a line; "
        "channel_names.txt in the pairs folder is used when present; with panels.csv, the names of all panels",
        metavar="NAMES",
        fixed=False,
    )
    exclude_channels: str | None = option(
        None, "markers to leave out, by name or index, separated by commas", metavar="NAMES", fixed=False
    )
    keep_channels: str | None = option(
        None,
        "markers to train on although they show nothing but camera noise, by name or index, separated by commas; by "
        "default, such channels are trained as empty",
        metavar="NAMES",
    )
    pixel_size_um: float | None = option(
        None,
        "side of a pixel of the pairs; that of a smaller level of their pyramids picks this level; default: that of "
        "dataset.json in the pairs folder, else unknown",
        unit="micrometres",
        above=0,
        maximum=20,
        inherited=False,
        fixed=False,
        follows=True,
    )
    he_layout: str = option("auto", "axis order of the H&E files", choices=("auto", "hwc", "chw"), fixed=False)
    orion_layout: str = option("auto", "axis order of the ORION files", choices=("auto", "hwc", "chw"), fixed=False)
    level: int = option(
        0, "level of the pyramids of OME-TIFF and OME-Zarr pairs to read; 0 = full resolution", minimum=0
    )
    patch_size: int = option(256, "side of a square patch", unit="pixels", minimum=16, maximum=4096)
    patches_per_image: int = option(12, "random training patches per core and epoch", minimum=1)
    patches_per_image_val: int = option(
        8, "validation patches per core, the same in every epoch; 0 = the whole grid", minimum=0
    )
    grid_stride: int | None = option(None, "step of the validation grid; default: patch_size", unit="pixels", minimum=1)
    target_normalization: str = option(
        "dataset",
        "quantiles of the training cores together, of each core by itself, or none",
        choices=("dataset", "core", "none"),
    )
    target_transform: str = option("linear", "curve applied to the normalised target", choices=("linear", "log1p"))
    noise_removal: bool = option(False, "replace isolated hot pixels of the target by their local median")
    augment: bool = option(True, "flips and quarter turns, and the stain jitter of stain_augmentation")
    stain_augmentation: float | None = option(
        None,
        "with augment: strength of the stain and colour jitter, a multiple of its ranges in docs/trust.md; 0 = none; "
        f"default: that of the run to resume, else {STAIN_AUGMENTATION:g}",
        minimum=0,
        maximum=4,
        follows=True,
        before=1.0,
    )
    num_workers: int | None = option(
        None,
        "loader processes per rank; auto = from the cores and ranks of the machine",
        minimum=0,
        metavar="N|auto",
        fixed=False,
    )
    mixed_cores: int = option(
        0,
        "mix the patches of so many cores at a time, in an order drawn anew each epoch, so that a tile of OME-TIFF or "
        "OME-Zarr is decoded once for all of its patches; 0 = mix those of all cores",
        unit="cores",
        minimum=0,
    )
    cache_mb: float = option(
        256.0,
        "decoded tiles that each loader process keeps of OME-TIFF and OME-Zarr pairs",
        unit="megabytes",
        minimum=0,
        fixed=False,
    )


@dataclass(frozen=True)
class ModelOptions:
    """model: the spatial U-Net"""

    base_features: int = option(
        32, "feature maps of the first level, doubled at each further one", minimum=1, maximum=512
    )
    depth: int = option(4, "number of down-sampling levels", minimum=1, maximum=7)
    norm: str = option("batch", "normalisation layer", choices=("batch", "group", "instance"))
    upsampling: str | None = option(
        None,
        "how the decoder doubles resolution: bilinear interpolation, or transposed convolutions, which leave a grid "
        f"in the prediction; default: that of the run to resume or of --init_from, else {UPSAMPLING}",
        choices=("bilinear", "transposed"),
        follows=True,
        before="transposed",
    )
    dropout: float = option(0.0, "probability of dropping a feature map in the bottleneck", minimum=0, below=1)
    output_start: str = option(
        "mean",
        "what the untrained network predicts: about the mean of each marker in the training cores, or about a half",
        choices=("mean", "half"),
    )
    use_boundary_guidance: bool = option(
        False, "give the network the Sobel gradient of the H&E as a fourth input channel"
    )
    encoder: str = option(
        UNET,
        "unet, or a model of timm by its name (timm:resnet50), with arguments where its weights need them "
        "(timm:NAME,reg_tokens=8); its largest stride then decides on the depth",
        metavar="unet|timm:NAME",
    )
    encoder_mean: str | None = option(
        None,
        "mean of red, green and blue in [0, 1] that a timm encoder expects, separated by commas; default: timm's",
        metavar="R,G,B",
    )
    encoder_std: str | None = option(None, "their standard deviation, likewise; default: timm's", metavar="R,G,B")


def channel_values(text: str | None) -> tuple[float, ...] | None:
    """Three numbers separated by commas, None for None; raises ValueError for anything else."""
    if text is None:
        return None
    values = tuple(float(part) for part in text.split(","))
    if len(values) != 3 or not all(math.isfinite(value) for value in values):
        raise ValueError("three numbers are needed")
    return values


@dataclass(frozen=True)
class TransferOptions:
    """transfer: start from an earlier model"""

    init_from: str | None = option(
        None,
        "start a new run from the weights of an earlier model (a run folder, best.pt or last.pt); the head's rows are "
        "matched by marker name. A resumed run does not read it again",
        metavar="RUN|FILE",
        fixed=False,
    )
    init_partial: bool = option(
        False,
        "where init_from names a model: take what fits from a network of another depth, norm or input, or without "
        "shared markers",
        fixed=False,
    )
    encoder_weights: str | None = option(
        None,
        "weights of a timm encoder in a local file, .safetensors or .pt; never downloaded",
        metavar="FILE",
        fixed=False,
    )
    encoder_train: str = option(
        "full",
        "what of the encoder trains: all of it; nothing (frozen, batch norm's statistics included); or its last stage "
        "(unet: the bottleneck)",
        choices=("full", "frozen", "last"),
    )
    encoder_rate_factor: float = option(
        1.0, "learning rate of the encoder, as a multiple of that of the decoder", above=0, maximum=10
    )


@dataclass(frozen=True)
class LossOptions:
    """loss: weights of the composite loss; a term of weight 0 is not computed in training"""

    mse_weight: float = option(0.8, "weight of the mean squared error", minimum=0)
    l1_weight: float = option(0.3, "weight of the mean absolute error", minimum=0)
    boundary_weight: float = option(0.1, "weight of the squared error on tissue boundaries", minimum=0)
    focal_weight: float = option(0.0, "weight of focal-R, which stresses large errors", minimum=0)
    variance_weight: float = option(0.1, "weight of the penalty on flat predictions", minimum=0)
    correlation_weight: float = option(
        0.0, "weight of 1 - Pearson r of each marker over the pixels of the batch", minimum=0
    )
    variance_form: str = option(
        "target",
        "target: relu(target_variance - v)^2; exponential: exp(-100 v), unstable, kept for comparison",
        choices=("target", "exponential"),
    )
    target_variance: float = option(0.01, "spatial variance under which a prediction counts as flat", above=0)
    channel_weights: str | None = option(
        None, "weights of single markers, e.g. CD3e=4,CD20=2; the others weigh 1", metavar="NAME=W,..."
    )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every named term, in the order of the log."""
        return {
            "mse": self.mse_weight,
            "l1": self.l1_weight,
            "boundary": self.boundary_weight,
            "focal": self.focal_weight,
            "variance": self.variance_weight,
            "correlation": self.correlation_weight,
        }


@dataclass(frozen=True)
class OptimisationOptions:
    """optimisation: AdamW, its schedule and when to stop"""

    epochs: int = option(30, "number of epochs", minimum=1, fixed=False)
    batch_size: int = option(12, "training patches per GPU and step", minimum=1, fixed=False)
    val_batch_size: int = option(8, "validation patches per GPU and step", minimum=1, fixed=False)
    learning_rate: float | None = option(
        1e-4,
        "peak learning rate; auto = from the number of optimiser steps",
        above=0,
        maximum=1,
        metavar="N|auto",
        follows=True,
    )
    weight_decay: float = option(2e-4, "decoupled weight decay; norms and biases have none", minimum=0)
    scheduler: str = option("plateau", "learning-rate schedule", choices=("plateau", "cosine", "constant"))
    lr_factor: float = option(0.5, "plateau: factor of a reduction", above=0, below=1)
    lr_patience: int = option(5, "plateau: epochs without a better validation loss before it", unit="epochs", minimum=0)
    warmup_epochs: float = option(0.0, "linear warm-up of the learning rate", unit="epochs", minimum=0)
    best_by: str = option(
        "loss",
        "what makes an epoch the best, whose model is best.pt: the lowest validation loss, or the highest validation "
        "Pearson, the mean over the markers that have one",
        choices=("loss", "pearson"),
    )
    early_stopping_patience: int = option(
        10, "stop after this many epochs without a new best, by best_by; 0 = off", unit="epochs", minimum=0, fixed=False
    )
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 = no clipping", minimum=0)
    accumulate_steps: int = option(1, "batches whose gradients make one optimiser step", minimum=1)
    ema_decay: float = option(0.0, "decay of the averaged weights used in validation; 0 = off", minimum=0, below=1)
    statistics_batches: int | None = option(
        None,
        "training batches over which the statistics of batch norm are measured anew before each validation; 0 = use "
        "the running averages; auto = 16, or as in the run that is resumed",
        minimum=0,
        metavar="N|auto",
        fixed=False,
        follows=True,
        before=0,
    )
    recalibrate: bool = option(
        True,
        "after training, fit a scale and an offset for each marker to training patches, which narrow predictions of "
        "best.pt that spread too far",
        fixed=False,
        before=False,
    )
    seed: int = option(42, "seed of everything random", minimum=0, maximum=2**63 - 1)

    @property
    def rate(self) -> float:
        """The peak learning rate, once it is known; raises ValueError where it is still auto."""
        if self.learning_rate is None:
            raise ValueError("the learning rate has not been worked out yet")
        return self.learning_rate


@dataclass(frozen=True)
class RuntimeOptions:
    """runtime: devices, precision, restarts"""

    use_amp: bool = option(False, "mixed precision on a GPU; amp_dtype names its type")
    amp_dtype: str = option(
        "auto",
        "auto: bfloat16 where the GPU has it, else float16; float16 comes with a gradient scaler",
        choices=("auto", "bfloat16", "float16"),
    )
    gpus: int | None = option(
        None, "GPUs of this machine to use; 0 = CPU; auto = all visible", minimum=0, metavar="N|auto", fixed=False
    )
    compile: bool = option(False, "compile the model, and on one rank the loss, with torch.compile", fixed=False)
    deterministic: bool = option(False, "deterministic kernels, slower")
    pinned_memory_mb: float = option(
        4096.0,
        "page-locked memory for batches on their way to the GPU, per rank; bounds the automatic number of loader "
        "processes, too",
        unit="megabytes",
        minimum=0,
        fixed=False,
    )
    stop_timeout_s: float = option(
        120.0,
        "how long the launcher of several ranks waits for them to save and end after a request to stop",
        unit="seconds",
        minimum=1,
        fixed=False,
    )
    resume: str | None = option(
        None,
        "auto: continue the run in output_dir, or start it where there is none; or a checkpoint to continue from",
        metavar="auto|FILE",
        inherited=False,
        fixed=False,
    )


@dataclass(frozen=True)
class OutputOptions:
    """output: where and what is written"""

    output_dir: str = option("runs/orion_spatial", "the run folder", metavar="DIR", inherited=False, fixed=False)
    sanity_check_freq: int = option(
        2, "draw a panel of predictions every N epochs; 0 = off", unit="epochs", minimum=0, fixed=False
    )
    save_every_minutes: float = option(
        0.0, "also save the state within an epoch, at this interval; 0 = off", unit="minutes", minimum=0, fixed=False
    )
    log_every_steps: int | None = option(
        None,
        "write a line of steps.jsonl every so many steps; auto = about 20 lines an epoch, 0 = none",
        unit="steps",
        minimum=0,
        metavar="N|auto",
        fixed=False,
    )
    tensorboard: bool = option(False, "also write TensorBoard events (needs the tensorboard package)", fixed=False)
    overwrite: bool = option(False, "replace the run that output_dir holds", inherited=False, fixed=False)


def declared_options() -> dict[str, Field[Any]]:
    """Every option of training, by name."""
    return {f.name: f for group in GROUPS.values() for f in fields(group)}


GROUPS: dict[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "transfer": TransferOptions,
    "loss": LossOptions,
    "optimisation": OptimisationOptions,
    "runtime": RuntimeOptions,
    "output": OutputOptions,
}


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    transfer: TransferOptions = field(default_factory=TransferOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    recipe: str = "none"

    @classmethod
    def from_options(cls, options: dict[str, Any], recipe: str = "none") -> TrainConfig:
        """Build from a flat ``{option: value}`` mapping, on top of the options' own defaults.

        ``recipe`` is the name of the recipe that the values came from, for the record. Raises InputError naming
        every option that does not exist or is out of range.
        """
        unknown = sorted(set(options) - set(declared_options()))
        if unknown:
            raise InputError(f"no such option in this version: {', '.join(unknown)}")
        groups = {
            name: group(**{f.name: options[f.name] for f in fields(group) if f.name in options})
            for name, group in GROUPS.items()
        }
        config = cls(**groups, recipe=recipe)
        problems = config.problems()
        if problems:
            raise InputError.listing("these options cannot be used:", problems, "Run with --help for every option.")
        return config

    @classmethod
    def of_run(cls, options: dict[str, Any]) -> TrainConfig:
        """The options that a checkpoint or config.json holds; one that its version did not have is what runs did then.

        Raises InputError as ``from_options``.
        """
        before = {name: declared.metadata["before"] for name, declared in declared_options().items()}
        return cls.from_options({**before, **options})

    def options(self) -> dict[str, Any]:
        """Flat ``{option: value}`` mapping, as written to config.json."""
        return {name: value for group in GROUPS for name, value in asdict(getattr(self, group)).items()}

    def changes_from(self, earlier: dict[str, Any]) -> list[str]:
        """Differences from the options of a run to be resumed that would silently change what it trains."""
        now = self.options()
        # An option left open follows the run.
        fixed = [f for group in GROUPS.values() for f in fields(group) if f.metadata["fixed"]]
        return [
            f"--{f.name}: {earlier.get(f.name, f.metadata['before'])} in the run, {now[f.name]} now"
            for f in fixed
            if earlier.get(f.name, f.metadata["before"]) != now[f.name]
            and not (f.metadata["follows"] and now[f.name] is None)
        ]

    def problems(self) -> list[str]:
        """Every option that is out of range or contradicts another, one sentence each."""
        found = [problem for group in GROUPS for problem in range_problems(getattr(self, group))]
        if not any(weight > 0 for weight in self.loss.weights.values()):
            names = ", ".join(f"--{name}_weight" for name in self.loss.weights)
            found.append(f"all loss weights are 0, so there is nothing to train: raise one of {names}")
        if self.data.fold is not None:
            try:
                fold_numbers(self.data.fold)
            except InputError as error:
                found.append(str(error))
            if self.data.split_file is not None:
                found.append("--fold and --split_file both choose the held-out cores: give one of them")
        if self.data.grid_stride is not None and self.data.grid_stride > self.data.patch_size:
            found.append(
                f"--grid_stride {self.data.grid_stride} leaves gaps between patches of --patch_size "
                f"{self.data.patch_size}: lower it"
            )
        if self.optimisation.warmup_epochs >= self.optimisation.epochs > 0:
            found.append(
                f"--warmup_epochs {self.optimisation.warmup_epochs:g} leaves no epoch of --epochs "
                f"{self.optimisation.epochs} after the warm-up: lower it"
            )
        found += self._encoder_problems()
        if self.output.overwrite and self.runtime.resume:
            found.append("--overwrite and --resume contradict each other: choose one")
        return found

    def _encoder_problems(self) -> list[str]:
        found = []
        name = self.model.encoder
        if name != UNET and not (name.startswith(TIMM) and name != TIMM):
            found.append(f"--encoder {name}: must be {UNET} or {TIMM}NAME")
        for option_name, text in (("encoder_mean", self.model.encoder_mean), ("encoder_std", self.model.encoder_std)):
            try:
                values = channel_values(text)
            except ValueError:
                found.append(f"--{option_name} {text}: must be three numbers separated by commas, one a colour")
                continue
            if option_name == "encoder_std" and values is not None and min(values) <= 0:
                found.append(f"--encoder_std {text}: every number must be above 0")
        return found


def fold_numbers(text: str) -> tuple[int, int]:
    """K and N of ``--fold K/N``, 1 <= K <= N and N >= 2. Raises InputError."""
    part, slash, parts = text.partition("/")
    if slash and part.isascii() and part.isdecimal() and parts.isascii() and parts.isdecimal():
        number, count = int(part), int(parts)
        if 1 <= number <= count and count >= 2:
            return number, count
    raise InputError(f"--fold {text}: write K/N with 1 <= K <= N and N >= 2, for example 1/5")


def load_options(path: str | Path) -> tuple[dict[str, Any], str]:
    """All inheritable options of an earlier run's config.json, checked for name and type, and its recipe's name.

    Raises InputError.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {path}: is not JSON ({error})") from None
    stored = document.get("options") if isinstance(document, dict) else None
    if not isinstance(stored, dict):
        raise InputError(f"--config {path}: is not the config.json of a run (it has no 'options')")
    known = declared_options()
    problems = [f"{name}: no such option in this version" for name in stored if name not in known]
    options = {name: f.metadata["before"] for name, f in known.items() if f.metadata["inherited"]}
    for name, value in stored.items():
        if name in known and known[name].metadata["inherited"]:
            if _has_type(value, str(known[name].type)):
                options[name] = value
            else:
                problems.append(f"{name}: {value!r} is not of type {known[name].type}")
    if problems:
        raise InputError.listing(f"--config {path} holds options that cannot be used:", problems)
    recipe = document.get("recipe")
    return options, recipe if isinstance(recipe, str) else "none"


def _has_type(value: Any, annotation: str) -> bool:
    kinds = annotation.replace(" ", "").split("|")
    if value is None:
        return "None" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, int):
        return "int" in kinds or "float" in kinds
    return type(value).__name__ in kinds
