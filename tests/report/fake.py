"""A made-up run for the tests of the report."""

import math

from supple.report.summary import Network, Outcome, Point, Summary


def fake_network(name: str, params: float, accuracy: float, baselines: bool = True) -> Network:
    ways = [Outcome(way="elastic", metrics={"accuracy": accuracy}, passes=4000, seconds=25.0)]
    if baselines:
        ways.append(
            Outcome(
                way="alone",
                metrics={"accuracy": accuracy - 0.004},
                passes=3000,
                seconds=18.0,
                note="lr 0.003",
            )
        )
        ways.append(
            Outcome(way="cut", metrics={"accuracy": accuracy / 2}, passes=3000, seconds=18.0)
        )
    return Network(
        name=name,
        config={"stem": 8},
        costs={"params": params, "macs": 11 * params, "weight_bytes": 4 * params},
        latency=4e-4 + params * 1e-8,
        latency_spread=1e-5,
        memory=2e5,
        file_bytes=int(4.2 * params),
        where={} if name == "full" else {"params": f"<= {params:.0f}"},
        outcomes=tuple(ways),
        files=(f"deploy/{name}/network.onnx",),
    )


def watched(step: int) -> dict:
    """What three sizes of a step are like."""
    roles, left = ("largest", "random", "smallest"), math.exp(-step / 300)
    return {
        "step": step,
        "sizes": [
            {
                "role": role,
                "cost": 0.9**i * 0.5 ** (2 * i),
                "loss": left + 0.1 * i,
                "norm": left,
            }
            for i, role in enumerate(roles)
        ],
        "cosines": [[0, 1, 0.9 - left], [0, 2, 0.5 - left], [1, 2, 0.7]],
    }


def fake_summary() -> Summary:
    sizes = [2_000 * 1.35**i for i in range(14)]
    points = [
        Point(
            values={
                "params": s * (1 + 0.3 * (k % 2)),
                "macs": 11 * s,
                "accuracy": 0.985 - 120 / s - 0.01 * (k % 2),
            },
            on_front=k % 2 == 0,
        )
        for k, s in enumerate(sorted(sizes * 2))
    ]
    steps = range(0, 1000, 10)
    return Summary(
        name="digits <demo>",
        metric="accuracy",
        maximize=True,
        tests=540,
        space_size=262_144,
        sites=(("stem", "width", "8 16 24 32"), ("blocks.1", "depth", "0 1")),
        fixed=(("head", "gives the classes, whose number the data fixes"),),
        losses={
            role: tuple((s, scale * math.exp(-s / 300) + 0.05) for s in steps)
            for role, scale in (("largest", 2.3), ("random", 2.4), ("smallest", 2.6))
        },
        validation={"full": ((250, 0.9), (500, 0.96), (1000, 0.98))},
        watched=tuple(watched(step) for step in range(0, 1000, 50)),
        points=tuple(points),
        costs=("params", "macs"),
        networks=(
            fake_network("full", 98_000, 0.985),
            fake_network("large", 42_000, 0.983),
            fake_network("medium", 18_000, 0.98),
            fake_network("small", 6_000, 0.969),
        ),
        stages=(("train", 25.0, False), ("search", 40.0, True)),
        device="1 thread of an x86 processor",
        facts={"seed": "0", "torch": "2.13.0"},
        recipe="name: digits\nmodel: <digits-cnn>\n",
    )
