"""Who gets what: the joint choice of pruning ratio and bandwidth (numpy; cvxpy only in reference.py)."""

from __future__ import annotations

from fedprune_cli.allocate import baselines, conic, objectives, picked, whole
from fedprune_cli.allocate.baselines import Allocator

ALLOCATORS: dict[str, type[Allocator]] = {
    "kkt": baselines.Kkt,
    "blocks": whole.Blocks,
    "selective": picked.Selective,
    "minmax": baselines.MinMax,
    "minlatency": baselines.MinLatency,
    "proportional": objectives.Proportional,
    "energy": objectives.LeastEnergy,
    "weighted": objectives.Weighted,
    "dense": baselines.Dense,
    "dense_equal": baselines.DenseEqual,
    "fixed": baselines.Fixed,
    "equal": baselines.Equal,
    "uniform": baselines.CommonRatio,
    "alternating": baselines.Alternating,
    "greedy": baselines.Greedy,
    "random": baselines.RandomShares,
    "cvxpy": conic.Cvxpy,
}
