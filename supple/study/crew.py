"""Who evaluates: this process itself, or workers that it gives configs to."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from supple.errors import SettingError, WorkerError, import_extra, nearest
from supple.space import Config
from supple.study.growing import Race
from supple.study.store import Evaluation, Stopped

__all__ = ["Alone", "Answer", "Crew", "Evaluate", "Place", "crew_of", "evaluated", "place_of"]

CONNECT_SECONDS = 5.0
"""How long to wait for a cluster to answer at all."""

_OFFERED = (
    "'ray' (workers on this machine, one for each core), 'ray:4' (four of them), "
    "'ray://host:10001' (a cluster, from anywhere) or 'host:6379' (a cluster that this machine "
    "belongs to)"
)
_PORTS = {"ray": 10001, "": 6379}
_MOST = 1024
_ADDRESS = re.compile(r"(ray://)?([\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})")
# Of a cluster that is started here, read when Ray is imported: it listens on the loopback only
# (Ray's default where firewalls ask, and an option elsewhere), reports to nobody, and its
# workers don't stand back behind everything else that runs, which latency would show.
_LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}


class Evaluate(Protocol):
    """Evaluates canonical configs."""

    def __call__(self, config: Config, *, race: Race | None = None) -> Evaluation | Stopped:
        """Evaluates one."""

    def together(
        self, configs: Sequence[Config], race: Race | None = None
    ) -> list[Evaluation | Stopped]:
        """Evaluates several, on the same batches."""


@dataclass(frozen=True)
class Answer:
    """What became of one config.

    Args:
        trial: The trial it was claimed by.
        config: The config.
        evaluation: What came out, or None.
        error: What the evaluation raised, or None; of several that were given together, the
            first one has it, and there is no answer for the others.
        lost: Why the worker is gone, where it is: the config is to be evaluated again.
    """

    trial: int
    config: Config
    evaluation: Evaluation | Stopped | None = None
    error: BaseException | None = None
    lost: str = ""


class Crew(Protocol):
    """Evaluates configs, by one worker or several."""

    @property
    def free(self) -> bool:
        """Whether any worker has nothing to do."""

    @property
    def busy(self) -> bool:
        """Whether any config that was given is unanswered."""

    def give(self, claimed: Sequence[tuple[int, Config]], race: Race | None) -> None:
        """Has one worker evaluate configs, given with their trials, together."""

    def answers(self) -> list[Answer]:
        """Waits for at least one answer while any is due, but not for long."""

    def close(self) -> None:
        """Ends what was started."""


class Alone:
    """This process, which evaluates what it was given when it is asked for the answers.

    Args:
        evaluate: Evaluates configs.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._given: list[tuple[int, Config]] = []
        self._race: Race | None = None

    @property
    def free(self) -> bool:
        return not self._given

    @property
    def busy(self) -> bool:
        return bool(self._given)

    def give(self, claimed: Sequence[tuple[int, Config]], race: Race | None) -> None:
        self._given, self._race = list(claimed), race

    def answers(self) -> list[Answer]:
        given, self._given = self._given, []
        try:
            outcomes = evaluated(self._evaluate, [config for _, config in given], self._race)
        except BaseException as error:
            return [Answer(*given[0], error=error)]
        return [Answer(*one, outcome) for one, outcome in zip(given, outcomes, strict=True)]

    def close(self) -> None:
        self._given = []


def evaluated(
    evaluate: Evaluate, configs: Sequence[Config], race: Race | None
) -> list[Evaluation | Stopped]:
    """Evaluates one config or several together."""
    if len(configs) == 1:
        return [evaluate(configs[0], race=race)]
    return evaluate.together(configs, race)


@dataclass(frozen=True)
class Place:
    """Where Ray's workers are.

    Args:
        address: Of an existing cluster, as Ray writes it; None for one that is started on
            this machine and ended with the search.
        number: Workers on this machine; None for as many as the cluster has cores.
    """

    address: str | None = None
    number: int | None = None


def place_of(workers: str | None) -> Place | None:
    """Reads and checks what `workers=` says, before anything long is begun.

    Args:
        workers: None for this process, `"ray"`, `"ray:N"`, `"ray://host:port"` or
            `"host:port"`.

    Returns:
        Where Ray's workers are; None for this process.

    Raises:
        SettingError: It says something else.
        MissingExtraError: Ray is not installed.
        WorkerError: Nothing answers at the address.

    Example:
        >>> print(place_of(None))
        None
    """
    if workers is None:
        return None
    place = _read(workers)
    if place.address is None:
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
    import_extra("ray", "ray")
    if place.address is not None:
        _check_answers(place.address)
    return place


def crew_of(place: Place | None, evaluate: Evaluate) -> Crew:
    """Returns who evaluates.

    Args:
        place: What `place_of` gave.
        evaluate: Evaluates a config; sent to the workers, where there are any.

    Raises:
        WorkerError: The workers can't be reached, or can't take over the search.
    """
    if place is None:
        return Alone(evaluate)
    from supple.study.ray_crew import RayCrew

    return RayCrew(place, evaluate)


def _read(workers: str) -> Place:
    text = str(workers).strip()
    if text == "ray":
        return Place()
    counted = re.fullmatch(r"ray:(\d+)", text)
    if counted:
        number = int(counted[1])
        if not 1 <= number <= _MOST:
            raise SettingError(f"workers must be 1 to {_MOST} in number, got {text!r}")
        return Place(number=number)
    if _ADDRESS.fullmatch(text):
        return Place(address=text)
    raise SettingError(f"workers must be {_OFFERED}, got {text!r}{_also(text)}")


def _also(text: str) -> str:
    """Says what does what was probably meant."""
    if text.isdigit():
        return (
            f"; {text} plain processes are {text} times the same search with the same study, "
            f"and 'ray:{text}' are as many workers of one search"
        )
    close = nearest(text, ["ray"])
    if close:
        return close
    if re.fullmatch(r"(ray://)?[\w.-]+", text):
        scheme = "ray" if text.startswith("ray://") else ""
        return f"; an address needs a port, such as {text}:{_PORTS[scheme]}"
    return ""


def _check_answers(address: str) -> None:
    parts = _ADDRESS.fullmatch(address)
    assert parts is not None
    host, port = parts[2].strip("[]"), int(parts[3])
    try:
        with contextlib.closing(socket.create_connection((host, port), CONNECT_SECONDS)):
            _check_speaks(address.removeprefix("ray://"))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise WorkerError(
            f"no Ray cluster answers at {address} ({why.lower()}); start one with "
            "`ray start --head`, correct host and port, or use 'ray' for workers right here"
        ) from error


def _check_speaks(address: str) -> None:
    """Sees whether what answers speaks Ray's protocol, for which Ray itself waits minutes."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # it would not answer without certificates
    grpc = import_extra("grpc", "ray")
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError as error:
            raise OSError(0, "something else does") from error
