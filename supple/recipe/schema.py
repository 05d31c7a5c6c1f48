"""What a recipe may say: one frozen pydantic model per section.

Numbers may be written as YAML writes them or as text (PyYAML reads `1e-4` as text): each
value is converted by the type of its field. Technique settings are kept as they came and are
checked by the technique itself.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: object) -> object:
    """Turns `"1e3"` into `1000`; leaves everything else to pydantic."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number


def _chosen(value: object) -> object:
    """Reads `key` or `{key: settings}` as a choice."""
    if isinstance(value, str):
        return {"key": value, "settings": {}}
    if isinstance(value, Mapping) and len(value) == 1:
        [(key, settings)] = value.items()
        return {"key": key, "settings": {} if settings is None else settings}
    raise ValueError("write a key, or one `key: {setting: value}`")


def _without_techniques(values: object) -> object:
    """Moves the one `room/technique: settings` of a section into its field `technique`."""
    if not isinstance(values, Mapping):
        return values
    keys = [key for key in values if isinstance(key, str) and "/" in key]
    if len(keys) > 1:
        raise ValueError(f"names {len(keys)} techniques ({', '.join(keys)}), wants one")
    plain = {key: value for key, value in values.items() if key not in keys}
    return plain | ({"technique": {keys[0]: values[keys[0]]}} if keys else {})


Whole = Annotated[int, BeforeValidator(_number)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Choice(Section):
    """Something found by a key, with its settings: a model, a data set, a technique."""

    key: str
    settings: dict[str, Any] = Field(default_factory=dict)


Chosen = Annotated[Choice, BeforeValidator(_chosen)]


class Training(Section):
    """How weights are trained.

    Args:
        epochs: Passes over the training set, at least 1; give this or `steps`.
        steps: Optimizer steps, at least 1.
        optimizer: `adamw` or another name that `supple.train` knows.
        lr: Learning rate at the end of the warm-up, above 0.
        weight_decay: Decoupled weight decay, at least 0.
        schedule: `cosine`, `constant` or `exponential`.
        warmup: Optimizer steps of linear warm-up.
        clip: Largest norm of the gradient, or none.
        ema: Decay of the averaged weights in [0, 1), or none.
        precision: `fp32` or `bf16`.
        checkpoint_every: Optimizer steps between two checkpoints.
    """

    epochs: Count | None = None
    steps: Count | None = None
    optimizer: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: str = "cosine"
    warmup: Whole = Field(default=0, ge=0)
    clip: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: Count = 200

    _technique = model_validator(mode="before")(_without_techniques)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("wants either epochs or steps")
        return self


class Train(Training):
    """How the shared weights are trained; the same settings train each size alone.

    Args:
        technique: The supernet rule, written as `supernet/bignas: {settings}`.
        batch_size: Examples in one batch.
        freeze_inactive: Whether elements that no size of a step used stay as they are.
        tensorboard: Whether TensorBoard's files are written, too.
        watch: Every so many steps, what each size's loss and gradient were like is noted for
            the report; 0 for never.
    """

    technique: Chosen = Choice(key="supernet/bignas")
    batch_size: Count = 64
    freeze_inactive: bool = False
    tensorboard: bool = False
    watch: Whole = Field(default=20, ge=0)


class Search(Section):
    """How the sizes worth having are found.

    Args:
        technique: The algorithm, written as `search/nsga2: {settings}`.
        evaluations: Networks to evaluate, at least 1.
        costs: Closed forms (`params`, `macs`, `weight_bytes`, `activation_bytes`) and
            measured ones (`latency[batch=1]`, `memory`, `energy`); `latency[predicted]` by
            the model in `latency`.
        latency: File of a latency model, as `supple profile` writes it for a recipe.
        metric: The figure of the validation set that sizes are chosen by; by default the
            task's own (`accuracy` or `perplexity`). `loss` tells more sizes apart where the
            validation set is small.
        recalibration_batches: Training batches that renew running statistics for each
            evaluation.
        workers: Who evaluates: none is the process itself; `ray` are workers on this machine,
            one for each core, `ray:4` four of them; `ray://host:10001` or `host:6379` those of
            a Ray cluster.
    """

    technique: Chosen = Choice(key="search/nsga2")
    evaluations: Count = 100
    costs: tuple[str, ...] = Field(default=("params", "macs"), min_length=1)
    latency: str | None = None
    metric: str | None = None
    recalibration_batches: Count = 8
    workers: Annotated[str, BeforeValidator(str)] | None = None

    _technique = model_validator(mode="before")(_without_techniques)


class Budget(Section):
    """A size to deploy: a name, and a bound for one or more costs.

    Args:
        name: Name of its folder and of its row in the table.
        where: Bounds by cost, such as `{"params": "<= 20 k"}`. In a recipe the costs stand
            beside the name: `{name: small, params: "<= 20 k"}`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    where: dict[str, str] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: object) -> object:
        if not isinstance(values, Mapping) or "where" in values:
            return values
        bounds = {key: value for key, value in values.items() if key != "name"}
        return {"where": bounds} | ({"name": values["name"]} if "name" in values else {})


class Deploy(Section):
    """What becomes of the front: which sizes, how compressed, in which formats.

    Args:
        budgets: The sizes to deploy.
        compress: Transforms applied to every deployed network, in this order.
        export: Formats, by the ending of the file.
    """

    budgets: tuple[Budget, ...] = ()
    compress: tuple[Chosen, ...] = ()
    export: tuple[Literal["onnx", "pt2", "xml"], ...] = ("onnx",)

    @model_validator(mode="after")
    def _names_differ(self) -> "Deploy":
        names = [budget.name for budget in self.budgets]
        if len({*names, "full"}) < len(names) + 1:
            raise ValueError("budgets need names that differ from each other and from 'full'")
        return self


class Compare(Section):
    """Which baselines the deployed sizes are set against.

    Args:
        alone: Whether each size is also trained alone, for as many optimizer steps as the
            supernet, once for each learning rate; the best on the validation set counts.
        cut: Whether each size is also cut from the full network that was trained alone.
        lrs: Learning rates for `alone`; by default a third of the recipe's, the recipe's
            own and three times it.
        fresh: Whether `alone` starts from newly drawn weights, as a network of that size
            would, or from the slices that the supernet started from; by default the latter
            only where the model came with pretrained weights.
        workers: Processes that train side by side, each with one thread.
    """

    alone: bool = True
    cut: bool = True
    lrs: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, min_length=1)
    fresh: bool | None = None
    workers: Count = 2

    @model_validator(mode="after")
    def _cut_needs_alone(self) -> "Compare":
        if self.cut and not self.alone:
            raise ValueError("cut needs alone: it cuts the full network that was trained alone")
        return self


class Recipe(Section):
    """One run, from data to deployed networks.

    Args:
        name: Name of the run and of its folder.
        seed: Where every random choice of the run starts.
        output: Folder that holds the runs.
        threads: Threads that the run's own process computes with; none leaves it to PyTorch.
        model: A key of `supple/models`, a `transformers` class or `module:callable`,
            with its settings.
        data: A data set by its key, with its settings.
        axes: Settings by axis; without any, Width, Heads and Depth as they come.
        profile: File of a device profile, as `supple profile` writes it: widths are rounded
            to the multiples that pay there, unless `axes` give a divisor.
        train: How the shared weights are trained.
        search: How the sizes are found.
        deploy: What is deployed.
        compare: Which baselines are trained.
        fast: What `--fast` changes, as `section.key: value`.

    Example:
        >>> recipe = Recipe.model_validate({
        ...     "name": "digits", "model": "digits-cnn", "data": "digits",
        ...     "train": {"supernet/bignas": {}, "epochs": 3, "lr": "1e-3"},
        ... })
        >>> recipe.train.technique.key, recipe.train.lr, recipe.model.key
        ('supernet/bignas', 0.001, 'digits-cnn')
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Whole = 0
    output: str = "runs"
    threads: Count | None = None
    model: Chosen
    data: Chosen
    axes: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    profile: str | None = None
    train: Train
    search: Search = Search()
    deploy: Deploy = Deploy()
    compare: Compare = Compare()
    fast: dict[str, Any] = Field(default_factory=dict)


class Tune(Training):
    """A step that trains one network: fine-tuning, or a technique that works while training.

    Args:
        technique: The rule, written as `prune/hesso: {settings}`; without one, plain training.
        keep_zeros: Whether plain training leaves weights at zero that are zero at its start,
            as pruning left them.
        distill: Weight of what the network says that the first step was given, against the
            labels, in [0, 1].
    """

    technique: Chosen | None = None
    keep_zeros: bool = True
    distill: float = Field(default=0.0, ge=0, le=1)


def _step(value: object) -> object:
    """Reads one step: `train: {...}`, or a transform as `room/technique: {settings}`."""
    if isinstance(value, Mapping) and list(value) == ["train"]:
        return {"train": value["train"] or {}}
    return {"technique": value}


class Step(Section):
    """One step of a compression.

    Args:
        technique: A transform and its settings, or
        train: training.
    """

    technique: Chosen | None = None
    train: Tune | None = None


EngineName = Literal[
    "auto", "pytorch", "pytorch-bf16", "onnxruntime", "openvino", "openvino-bf16"
]


class Compression(Section):
    """One run that makes a trained network smaller, step by step.

    Args:
        name: Name of the run and of its folder.
        seed: Where every random choice of the run starts.
        output: Folder that holds the runs.
        threads: Threads that the run computes with; none leaves it to PyTorch.
        model: A key of `supple/models`, a `transformers` class or `module:callable`,
            with its settings: the network to be compressed.
        data: A data set by its key, with its settings.
        batch_size: Examples in one batch.
        calibration_batches: Training batches that transforms may look at.
        compress: The steps, in their order.
        export: Formats of the network that comes out, by the ending of the file.
        engines: Engines that are tried at the end, one example at a time, to write the network
            for the fastest (see `supple.deploy.engines`); `auto` tries all.
        fast: What `--fast` changes, as `section.key: value`.

    Example:
        >>> recipe = Compression.model_validate({
        ...     "name": "small", "model": "digits-cnn", "data": "digits",
        ...     "compress": [{"prune/global-mp": {"sparsity": 0.8}}, {"train": {"steps": 9}}],
        ... })
        >>> recipe.compress[0].technique.key, recipe.compress[1].train.steps
        ('prune/global-mp', 9)
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Whole = 0
    output: str = "runs"
    threads: Count | None = None
    model: Chosen
    data: Chosen
    batch_size: Count = 64
    calibration_batches: Count = 8
    compress: tuple[Annotated[Step, BeforeValidator(_step)], ...] = Field(min_length=1)
    export: tuple[Literal["onnx", "pt2", "xml"], ...] = ("onnx",)
    engines: tuple[EngineName, ...] = ()
    fast: dict[str, Any] = Field(default_factory=dict)
