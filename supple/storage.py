"""Networks in folders: safetensors and JSON, no pickles, checked, written atomically.

A folder holds

    supple.json             what the network is: provenance, structure, checksums of the rest
    weights.safetensors     parameters and persistent buffers, each once
    buffers.safetensors     tensors that a state dict leaves out, where there are any
    inputs.safetensors      of an elastic network: the example inputs
    statistics.safetensors  of an elastic network: recalibrated statistics, where there are any
    axes.safetensors        of an elastic network: parameters that axes added, if they did

`save` writes it under another name beside its place and moves it there when it is complete;
`load` checks every file before it builds anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supple import files, rebuild
from supple.axes.base import Axis, added
from supple.errors import CheckpointError, ConcurrencyError, SettingError, SuppleError
from supple.network import Elastic, elastic
from supple.plan import describe
from supple.space import Config, Fixed, Space
from supple.uniform import fitted, uniform_config

__all__ = ["load", "noted", "save", "uniform_config"]

SCHEMA = 1
DESCRIPTION = "supple.json"
WEIGHTS, BUFFERS = "weights.safetensors", "buffers.safetensors"
INPUTS, STATISTICS = "inputs.safetensors", "statistics.safetensors"
AXES = "axes.safetensors"
_OURS = (DESCRIPTION, WEIGHTS, BUFFERS, INPUTS, STATISTICS, AXES)
_HELD = "held:"  # no name of a parameter or buffer starts like this
_AGAIN = "save the network again, or fetch the folder anew"

Content = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]


def save(network: Elastic | nn.Module, directory: str | os.PathLike[str]) -> None:
    """Saves a network so that `load` gives it back: the same outputs, bit by bit.

    Args:
        network: An elastic network (with its space and recalibrated statistics) or a module,
            extracted or not.
        directory: The folder to write. One that holds a saved network is replaced when the new
            one is complete; files in it that are not Supple's are kept.

    Raises:
        CheckpointError: The folder holds something else or can't be written, or a tensor has
            no values (the meta device).
        SettingError: An example input is of a type that no file can hold.

    Example:
        >>> import tempfile
        >>> from supple.models.base import build
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(build("digits-cnn"), f"{folder}/digits")
        ...     loaded = load(f"{folder}/digits")
        >>> type(loaded).__name__
        'DigitsCNN'
    """
    target = Path(os.path.realpath(directory))  # a link stays a link
    module = network.module if isinstance(network, Elastic) else network
    if isinstance(network, Elastic) and network._active is not None:
        raise ConcurrencyError("a size of this network is active; leave its block, then save")
    files.check_folder(
        target, lambda folder: (folder / DESCRIPTION).is_file(), "a saved network"
    )
    description, tensors = _described(module)
    description["kind"] = "network"
    if isinstance(network, Elastic):
        elastic, more = _described_elastic(network)
        description |= {"kind": "elastic", "elastic": elastic}
        tensors |= more
    with files.replacing_folder(target, _OURS) as folder:
        sums = {}
        for name, content in tensors.items():
            files.write_tensors(folder / name, content)
            sums[name] = _sha256(folder / name)
        files.write_json(folder / DESCRIPTION, {**description, "files": sums}, schema=SCHEMA)


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    axes: Sequence[Axis] | None = None,
    allow_code: bool = False,
) -> Any:
    """Loads a network that `save` wrote, onto the CPU.

    Models of `supple/models` and classes of `transformers` are built again from the file; of
    any other, give the structure.

    Args:
        directory: The folder.
        model: The structure where the file does not suffice: the model that the network was
            made from (as it was given to `supple.elastic`), or one like the network itself. It
            is copied; its own weights do not matter.
        axes: Axes that are not Supple's own, found by their names.
        allow_code: Whether a base model of the form `module:callable` may be imported and
            called.

    Returns:
        An `Elastic` or an `nn.Module`, as it was saved, in the same mode.

    Raises:
        CheckpointError: A file is missing, damaged or of a newer version, `model` or `axes` is
            needed, or `model` is another network. Nothing is loaded then.
    """
    folder = Path(directory)
    description = _read_description(folder)
    try:
        sums = dict(description["files"])
        tensors = {name: _read_tensors(folder, name, s) for name, s in sums.items()}
        module = _structure(description, tensors, folder, model, axes, allow_code)
        _fill(module, description, tensors, folder)
        if description["kind"] == "network":
            return module
        return _elastic(module, description["elastic"], tensors, axes, folder)
    except SuppleError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{folder / DESCRIPTION} does not fit what this version of Supple expects "
            f"({type(error).__name__}: {error}); {_AGAIN}"
        ) from error


def noted(net: Elastic, config: Config, module: nn.Module) -> nn.Module:
    """Gives an extracted network its provenance and, where there is one, its configuration.

    Args:
        net: The elastic network that it was taken from.
        config: Its size.
        module: The extracted network.

    Returns:
        `module`, with `supple_provenance`; a `transformers` model of uniform size also has the
        configuration of that size, so that `save_pretrained` and `from_pretrained` work, unless
        `generate` needs a larger count (see `Counts.without`).
    """
    rebuild.note_extraction(net, config, module)
    patch = net.patch(config)
    if patch.rounded or patch.rounded_inputs:
        _note_packed(net, module)
    dropped = patch.dropped
    if dropped and net.counts().exceed(dropped):
        return module
    return fitted(net, config, module)


def _note_packed(net: Elastic, module: nn.Module) -> None:
    """Adds to an extracted network's provenance which layers were put in others' places."""
    provenance = vars(module)["supple_provenance"]
    before = rebuild.follow(rebuild.structure_of(net.module), provenance["steps"][-1:])
    was = {path: type(part) for path, part in before.named_modules()}
    placed: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{other}.") or not other for other in placed)
        if not inside and was.get(path) is not type(part):
            placed[path] = part
            taken_in = getattr(part, "layer", None)
            if isinstance(taken_in, nn.Module) and type(taken_in) is was.get(path):
                before = _with(before, path, taken_in)
    step = vars(rebuild.note_layers(before, placed))["supple_provenance"]["steps"][-1]
    provenance["steps"].append(step)


def _with(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    model.set_submodule(path, module)
    return model


# --- writing ----------------------------------------------------------------------------------


def _described(module: nn.Module) -> Content:
    """What a module is, and its tensors by file."""
    weights, rest, tied = _owners(module)
    provenance = rebuild.provenance_of(module)
    how, found = _rebuildable(module, provenance)
    held = {f"{_HELD}{i}": tensor for i, (_, tensor) in enumerate(found.held)}
    tensors = {WEIGHTS: weights} | ({BUFFERS: rest | held} if rest or held else {})
    for name, tensor in {**weights, **rest, **held}.items():
        if tensor.is_meta:
            raise CheckpointError(f"'{name}' is on the meta device: it has no values to save")
    modes = {path: part.training for path, part in module.named_modules()}
    root = module.training
    return {
        "provenance": provenance,
        "rebuild": how,
        "outline": rebuild.outline(module),
        "tied": tied,
        "held": [at for at, _ in found.held],
        "frozen": [n for n, p in module.named_parameters() if not p.requires_grad],
        "training": {"": root, **{p: mode for p, mode in modes.items() if mode != root}},
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in weights.values()}),
    }, tensors


def _owners(
    module: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Tensors of the state dict and others, once each, and for every other name the first."""
    parameters = module.named_parameters(remove_duplicate=False)
    named: dict[str, Tensor] = {name: p for name, p in parameters if not added(name)}
    named.update(module.named_buffers(remove_duplicate=False))
    state = {n: t for n, t in module.state_dict(keep_vars=True).items() if not added(n)}
    for name in state:
        if name not in named:
            raise CheckpointError(
                f"'{name}' of {type(module).__name__}'s state is no tensor that it owns, and "
                "only tensors can be saved"
            )
    owners: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name in sorted(named, key=lambda name: name not in state):
        owner = first.setdefault(_place(named[name]), name)
        if owner == name:
            owners[name not in state][name] = named[name]
        else:
            tied[name] = owner
    return *owners, tied


def _place(tensor: Tensor) -> Any:
    """The same for tensors that are the same memory seen in the same way."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    start = tensor.untyped_storage().data_ptr()
    return start, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _rebuildable(
    module: nn.Module, provenance: Mapping[str, Any]
) -> tuple[dict[str, Any], rebuild.Differences]:
    """Whether the network can be built from its file alone, and what is to be put right then.

    It is tried here and now, so that what is missing at load is known at save. `reason` says
    why a model will have to be given; `own_axes` names axes that will.
    """
    bare = rebuild.differences(module, None)
    origin, own = provenance["base"]["origin"], rebuild.own_axes(provenance["steps"])
    how: dict[str, Any] = {"reason": "", "own_axes": own, "overrides": []}
    if origin is None:
        how["reason"] = "its class is neither of supple/models nor exported by transformers"
    if origin is None or own or rebuild.needs_code(origin):
        return how, bare
    try:
        built = rebuild.follow(rebuild.build(origin), provenance["steps"])
    except Exception as error:  # whatever a constructor raises: then a model must be given
        how["reason"] = f"building it anew failed ({type(error).__name__}: {error})"
        return how, bare
    found = rebuild.differences(module, built)
    if not found.reasons:
        rebuild.apply_overrides(built, [*found.overrides, *found.held])
        left = rebuild.differences(module, built).overrides
        found.reasons.extend(f"{rebuild.place(at)} can't be set" for at, _ in left)
    if found.reasons:
        how["reason"] = f"it was changed since it was built: {'; '.join(found.reasons[:3])}"
        return how, bare
    how["overrides"] = [list(override) for override in found.overrides]
    return how, found


def _described_elastic(net: Elastic) -> Content:
    try:
        inputs, examples = rebuild.pack([net.args, net.kwargs])
    except TypeError as error:
        raise SettingError(
            f"the example inputs can't be saved ({error}); make the network elastic with "
            "tensors and plain values as inputs"
        ) from error
    statistics: dict[str, Tensor] = {}
    for index, values in enumerate(net.statistics.values()):
        statistics.update({f"{index}/{name}": tensor for name, tensor in values.items()})
    description = {
        "axes": rebuild.axes_record(net.axes),
        "space": json.loads(net.space.to_json()),
        "inputs": inputs,
        "verified": net.verified,
        "statistics": [dict(config) for config in net.statistics],
    }
    more: dict[str, dict[str, Tensor]] = {INPUTS: examples, STATISTICS: statistics}
    more[AXES] = {**net.added_parameters()}
    return description, {name: tensors for name, tensors in more.items() if tensors}


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


# --- reading ----------------------------------------------------------------------------------


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}{_left_behind(folder)}")
    found = files.read_json(path, checked=False)
    expected = found.pop("sha256", None)
    if expected != files.checksum(found):
        raise CheckpointError(f"{path} doesn't match its checksum: it is damaged; {_AGAIN}")
    schema = found.pop("schema", None)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise CheckpointError(
            f"{path} was written by a newer Supple (schema {schema}; this one reads up to "
            f"{SCHEMA}); install a newer version"
        )
    missing = {"kind", "files", "provenance", "outline"} - set(found)
    if missing:
        raise CheckpointError(f"{path} is no description of a network: no {sorted(missing)}")
    return found


def _left_behind(folder: Path) -> str:
    """A hint where a process was killed between moving the old folder away and the new in."""
    with contextlib.suppress(OSError):
        for other in sorted(folder.parent.glob(f".{folder.name}.*.old")):
            return f", but the network that was saved before it is in {other}: rename that"
    return "; give the folder of a network that was saved with supple.save"


def _read_tensors(folder: Path, name: str, expected: str) -> dict[str, Tensor]:
    path = folder / name
    if name not in _OURS:
        raise CheckpointError(f"{folder / DESCRIPTION} names a file of another folder: {name}")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; {_AGAIN}")
    try:
        found = _sha256(path)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    if found != expected:
        raise CheckpointError(f"{path} doesn't match its checksum: it is damaged; {_AGAIN}")
    # In memory of their own: a kernel may take another path, and round otherwise, for tensors
    # that lie at odd addresses of the file's memory.
    read = files.read_tensors(path)[0]
    return {name: read.pop(name).clone() for name in list(read)}


def _structure(
    description: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    model: nn.Module | None,
    axes: Sequence[Axis] | None,
    allow_code: bool,
) -> nn.Module:
    """The network without its weights."""
    base, steps = (description["provenance"][key] for key in ("base", "steps"))
    how = description["rebuild"]
    if model is not None:
        return _structure_from(model, description, tensors, folder, axes)
    if how["reason"]:
        raise CheckpointError(
            f"{folder}: the network ({base['class']}) can't be built from its files, because "
            f"{how['reason']}; give the model it was made from: load(..., model=...)"
        )
    if set(how["own_axes"]) - {axis.name for axis in axes or ()}:
        raise CheckpointError(
            f"{folder}: the network was made with axes that are not Supple's own, "
            f"{how['own_axes']}, and files hold no code; give them as axes=[...], or a network "
            "of the same structure as model=..."
        )
    built = rebuild.build(base["origin"], allow_code, tensors=len(base["shapes"]))
    module = rebuild.follow(built, steps, axes)
    rebuild.apply_overrides(module, how["overrides"])
    _check_outline(module, description, folder, "built anew, it")
    return module


def _structure_from(
    model: nn.Module,
    description: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    axes: Sequence[Axis] | None,
) -> nn.Module:
    """The structure that a given model stands for: the base, or the network itself."""
    base, steps = (description["provenance"][key] for key in ("base", "steps"))
    copied = rebuild.structure_of(model)
    given = {name: list(shape) for name, shape in rebuild.shapes_of(copied).items()}
    final = _final_shapes(description, tensors)
    lacking = set(description["rebuild"]["own_axes"]) - {axis.name for axis in axes or ()}
    if steps and given == base["shapes"] and not lacking:
        copied = rebuild.follow(copied, steps, axes)
    elif given != final:
        raise CheckpointError(
            f"{folder}: the model given is another network: {_first_difference(given, final)}; "
            f"give the {base['class']} that it was made from"
        )
    rebuild.apply_overrides(copied, description["rebuild"]["overrides"])
    _check_outline(copied, description, folder, "the model given")
    return copied


def _final_shapes(
    description: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, list[int]]:
    stored = {**tensors[WEIGHTS], **tensors.get(BUFFERS, {})}
    shapes = {name: list(t.shape) for name, t in stored.items() if not name.startswith(_HELD)}
    return shapes | {name: shapes[owner] for name, owner in description["tied"].items()}


def _first_difference(given: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> str:
    for name, shape in wanted.items():
        if given.get(name) != shape:
            has = f"has shape {tuple(given[name])}" if name in given else "is not in it"
            return f"'{name}' {has}, in the file it has shape {tuple(shape)}"
    extra = next(name for name in given if name not in wanted)
    return f"'{extra}' is not in the file"


def _check_outline(
    module: nn.Module, description: Mapping[str, Any], folder: Path, what: str
) -> None:
    found = next(rebuild.structural(description["outline"], rebuild.outline(module)), None)
    if found is not None:
        raise CheckpointError(
            f"{folder}: {what} is another network: in the file {found}; give the model that "
            "it was made from as model=..., or install the versions it was saved with"
        )


def _fill(
    module: nn.Module,
    description: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
) -> None:
    """Gives the structure its tensors and modes."""
    stored = {**tensors[WEIGHTS], **tensors.get(BUFFERS, {})}
    frozen = set(description["frozen"])
    made: dict[str, Tensor] = {}
    for name, kind in description["outline"].items():
        if kind not in ("parameter", "buffer"):
            continue
        owner = description["tied"].get(name, name)
        if owner not in stored:
            raise CheckpointError(f"{folder / WEIGHTS} lacks '{owner}'; {_AGAIN}")
        if owner not in made:
            tensor = stored[owner]
            is_weight = kind == "parameter"
            made[owner] = nn.Parameter(tensor, owner not in frozen) if is_weight else tensor
        path, _, leaf = name.rpartition(".")
        part = module.get_submodule(path)
        (part._parameters if kind == "parameter" else part._buffers)[leaf] = made[owner]  # type: ignore[assignment]
    held = [(at, stored[f"{_HELD}{i}"]) for i, at in enumerate(description["held"])]
    rebuild.apply_overrides(module, held)
    _set_modes(module, description["training"])
    if description["provenance"]["steps"]:
        vars(module)["supple_provenance"] = description["provenance"]
    for part in module.modules():
        describe(part)


def _set_modes(module: nn.Module, modes: Mapping[str, bool]) -> None:
    module.train(modes[""])
    for path, mode in modes.items():
        if path:
            module.get_submodule(path).training = mode


def _elastic(
    module: nn.Module,
    saved: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    axes: Sequence[Axis] | None,
    folder: Path,
) -> Elastic:
    args, kwargs = rebuild.unpack(saved["inputs"], tensors.get(INPUTS, {}))
    chosen = rebuild.axes_from(saved["axes"], axes)
    net = elastic(module, args, kwargs, chosen, verify=False)
    _restrict(net, Space.from_json(json.dumps(saved["space"])), folder)
    net.verified = saved["verified"]
    _fill_added(net, tensors.get(AXES, {}), folder)
    for index, config in enumerate(saved["statistics"]):
        mark = f"{index}/"
        values = {n: t for n, t in tensors[STATISTICS].items() if n.startswith(mark)}
        net.statistics[Config(config)] = {n.removeprefix(mark): t for n, t in values.items()}
    return net


def _fill_added(net: Elastic, saved: Mapping[str, Tensor], folder: Path) -> None:
    """Gives the parameters that axes added their values."""
    own = net.added_parameters()
    shapes, wanted = ({n: list(t.shape) for n, t in group.items()} for group in (own, saved))
    if shapes != wanted:
        raise CheckpointError(
            f"{folder / AXES}: this version of Supple adds other parameters to the network: "
            f"{_first_difference(shapes, wanted)}; make the network elastic and train it anew"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _restrict(net: Elastic, saved: Space, folder: Path) -> None:
    """Takes away the sites that the saved space lacks, and compares the rest."""
    why: dict[str, str] = {fixed.name: fixed.reason for fixed in saved.fixed}
    net.remove_sites(
        {s.name: why.get(s.name, "") for s in net.space.sites if s.name not in saved.names}
    )
    mine = json.loads(net.space.to_json())["sites"]
    theirs = json.loads(saved.to_json())["sites"]
    for site, wanted in zip([*mine, *[None] * len(theirs)], theirs, strict=False):
        if site != wanted:
            raise CheckpointError(
                f"{folder}: this version of Supple, PyTorch or transformers finds other sites "
                f"in the model: in the file {wanted}, now {site}; load it with the versions it "
                "was saved with, or make the module elastic anew"
            )
    net.space = Space(net.space.sites, [Fixed(f.name, f.reason) for f in saved.fixed])
