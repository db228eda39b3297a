"""Each stage of a round by itself, against the equations by hand: what is planned by belief and charged at the truth."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import Step, make_setup, steps_of

from fedprune_cli.allocate.deadline import dense_deadline
from fedprune_cli.allocate.inverse import rate
from fedprune_cli.execute import executor
from fedprune_cli.round.bill import Bill, charge
from fedprune_cli.round.plan import Plan, choose, plan_round, round_problems
from fedprune_cli.round.plan import _truth as truth_of
from fedprune_cli.round.receive import _contribution as contribution
from fedprune_cli.round.roster import Roster, choose_roster
from fedprune_cli.round.setup import Setup, build_learner
from fedprune_cli.round.step import round_step
from fedprune_cli.round.work import Results, Work, assign, train_round
from fedprune_cli.serve.deliver import Arrival
from fedprune_cli.store.state import Array, State
from fedprune_cli.wire.masks import encode_mask

HARD = (
    "devices=sampled", "devices.count=8", "devices.fresh=3", "devices.per_round=5", "rounds=8", "pruner=taylor", "faults.clock_error=0.5",
    "faults.channel_error=0.5", "faults.die=0.4", "participation.freeze_below=0.3", "participation.freeze_window=1",
    "training.lr=0.02", "partition.alpha=0.2", "allocator.on_infeasible=drop", "payload.bits=[8]", "failsafe.safe_ratio=true",
    "deadline.fraction=0.3", "pruner.max_ratio=0.5",
)  # fmt: skip


@dataclass(frozen=True)
class Stages:
    """A round, stage by stage, and what came of it."""

    setup: Setup
    state: State
    roster: Roster
    plan: Plan
    work: Work
    results: Results
    bill: Bill
    step: Step


@functools.cache
def stages() -> Stages:
    """Returns the first round in which some devices train, some are frozen, somebody dies and somebody before it is turned away."""
    setup = make_setup(*HARD)
    fleet = setup.scenario.fleet  # no two radios are equal
    fleet = dataclasses.replace(fleet, tx_power_w=fleet.tx_power_w * np.linspace(0.5, 2, len(fleet.tx_power_w)))
    setup = dataclasses.replace(setup, scenario=dataclasses.replace(setup.scenario, fleet=fleet))
    build = functools.partial(build_learner, setup.experiment, setup.scenario)
    with executor(setup.experiment.execution, build) as workers:
        for step in steps_of(setup, 8):
            roster = choose_roster(setup, step.before.round, step.before.slots)
            if not (len(roster.training) and len(roster.frozen)):
                continue
            plan = plan_round(setup, roster, step.before.slots)
            work = assign(setup, step.before, roster, plan)
            died, behind = work.fates.died, plan.devices != roster.training[: len(plan.devices)]
            if died.all() or not (died & behind).any():
                continue
            results = train_round(setup, work, workers)
            bill = charge(setup, roster, plan, work, results)
            return Stages(setup, step.before, roster, plan, work, results, bill, step)
    raise AssertionError("no such round: choose others")


def flops_of(of: Stages, device: int, *, frozen: bool) -> tuple[float, float]:
    """Returns F and G of a device: the FLOPs of its samples in the shared and the personalized part."""
    schedule = of.setup.personal_schedule(device) if frozen else of.setup.schedule(device)
    of_kind = of.setup.blueprint.cost.flops
    per_phase = [(phase.samples * of_kind[phase.kind][0], phase.samples * of_kind[phase.kind][1]) for phase in schedule]
    shared, personal = (sum(part) for part in zip(*per_phase, strict=True))
    return float(shared), float(personal)


def compute_s(of: Stages, device: int, *, frozen: bool) -> float:
    fleet, size = of.setup.scenario.fleet, of.setup.blueprint.cost.shared_params
    shared, personal = flops_of(of, device, frozen=frozen)
    kept = of.work.masks[device].sum() / size
    return float(fleet.cycles_per_flop[device] * (kept * shared + personal) / fleet.cpu_hz[device])


def broadcast_s(of: Stages, bits: float, listeners: Array) -> float:
    """Returns the seconds of a broadcast over the whole band at the rate of the worst true gain among the listeners."""
    channel, gain = of.setup.scenario.channel, of.setup.scenario.at(of.state.round).gain_linear[listeners].min()
    snr = channel.bs_power_w * gain / (channel.noise_w_per_hz * channel.bandwidth_hz)
    return float(bits / (channel.bandwidth_hz * np.log2(1 + snr)))


def mask_bits(of: Stages, devices: Array) -> int:
    return sum(8 * len(encode_mask(of.work.masks[device])) for device in devices.tolist())


def test_who_trains_is_charged_at_the_truth_and_who_dies_up_to_that_moment() -> None:
    of = stages()
    fleet, channel, gain = (
        of.setup.scenario.fleet,
        of.setup.scenario.channel,
        of.setup.scenario.at(of.state.round).gain_linear,
    )
    bits = 32 * of.setup.blueprint.cost.shared_params + mask_bits(of, of.plan.devices)
    assert of.bill.training.bytes_down == bits / 8
    np.testing.assert_allclose(of.bill.training.downlink_s, broadcast_s(of, bits, of.roster.training))
    for at, device in enumerate(of.plan.devices.tolist()):
        band_hz = of.plan.allocation.bandwidth_hz[of.plan.admitted_places[at]]
        rate_bps = band_hz * np.log2(1 + fleet.tx_power_w[device] * gain[device] / (channel.noise_w_per_hz * band_hz))
        sent = of.results.updates[at].sent_bytes
        whole_s, send_s, share = compute_s(of, device, frozen=False), 8 * sent / rate_bps, of.work.fates.work[at]
        done_s = share * (whole_s + send_s)
        np.testing.assert_allclose(of.bill.training.compute_s[at], min(whole_s, done_s))
        np.testing.assert_allclose(of.bill.training.uplink_s[at], max(done_s - whole_s, 0), atol=1e-18)
        per_s = fleet.energy_coefficient[device] * fleet.cpu_hz[device] ** 3
        joules = per_s * min(whole_s, done_s) + fleet.tx_power_w[device] * max(done_s - whole_s, 0)
        np.testing.assert_allclose(of.bill.training.joules[at], joules)
    assert (of.work.fates.work[of.work.fates.died] < 1).all()


def test_the_frozen_hear_the_broadcast_out_and_only_compute() -> None:
    of = stages()
    assert of.bill.personal is not None
    everybody = np.concatenate([of.roster.training, of.roster.frozen])
    bits = 8 * of.bill.training.bytes_down + mask_bits(of, of.roster.frozen)
    assert of.bill.personal.bytes_down == of.bill.all.bytes_down == bits / 8
    np.testing.assert_allclose(of.bill.personal.downlink_s, broadcast_s(of, bits, everybody))
    wanted = [compute_s(of, device, frozen=True) for device in of.roster.frozen.tolist()]
    np.testing.assert_allclose(of.bill.personal.compute_s, wanted)
    assert not of.bill.personal.uplink_s.any()
    assert of.bill.personal_s == of.bill.personal.latency_s.max()


@pytest.mark.parametrize("worst", ["training", "frozen"])
def test_the_frozen_wait_for_the_worst_listener_whoever_that_is(worst: str) -> None:
    of = stages()
    device = getattr(of.roster, worst)[0]
    gain = np.where(np.arange(len(of.roster.gain_linear)) == device, 1e-14, of.roster.gain_linear)
    bill = charge(of.setup, dataclasses.replace(of.roster, gain_linear=gain), of.plan, of.work, of.results)
    assert bill.personal is not None
    assert of.bill.personal is not None
    assert bill.personal.downlink_s[0] > 2 * of.bill.personal.downlink_s[0]
    slower = bill.training.downlink_s[0] > 2 * of.bill.training.downlink_s[0]
    assert slower == (worst == "training")


def test_the_plan_is_by_belief_and_its_rates_are_true() -> None:
    of = stages()
    faults, scenario, slots = of.setup.experiment.faults, of.setup.scenario, of.state.slots
    ids, channel, gain = of.roster.training, scenario.channel, scenario.at(of.state.round).gain_linear
    cpu_hz, believed_gain = faults.estimate(of.setup.experiment.seed, of.state.round, scenario.fleet.cpu_hz, gain)
    assert (cpu_hz != scenario.fleet.cpu_hz).all()
    believed_snr = scenario.fleet.tx_power_w[ids] * believed_gain[ids] / channel.noise_w_per_hz
    true_snr = scenario.fleet.tx_power_w[ids] * gain[ids] / channel.noise_w_per_hz
    np.testing.assert_allclose(of.plan.problem.snr_hz, believed_snr)
    np.testing.assert_allclose(of.plan.reference.snr_hz, true_snr)
    true_s = np.array([flops_of(of, k, frozen=False)[0] for k in ids.tolist()]) * scenario.fleet.cycles_per_flop[ids]
    np.testing.assert_allclose(of.plan.reference.shared_compute_s, true_s / scenario.fleet.cpu_hz[ids])
    caution = 1 + np.arange(8) / 10
    careful = plan_round(of.setup, of.roster, {**slots, "caution": caution})
    np.testing.assert_allclose(careful.problem.shared_compute_s, caution[ids] * true_s / cpu_hz[ids])
    np.testing.assert_array_equal(careful.reference.shared_compute_s, of.plan.reference.shared_compute_s)
    allocation = of.plan.allocation
    np.testing.assert_allclose(allocation.rate_bps, rate(allocation.bandwidth_hz, true_snr))
    # the deadline is a fraction of the dense optimum that the server believes in, without margins and compression
    truth = truth_of(of.setup, of.roster)
    believed = dataclasses.replace(
        truth, fleet=dataclasses.replace(truth.fleet, cpu_hz=cpu_hz), gain_linear=believed_gain[ids]
    )
    reference = round_problems(of.setup.blueprint, believed, of.state.round, slots).reference
    assert of.plan.problem.deadline_s == pytest.approx(0.3 * dense_deadline(reference)[0])
    kept = np.setdiff1d(np.arange(8), of.plan.devices)
    assert slots["prune_ratio"][of.roster.frozen].any()  # who is frozen goes on with what it kept last
    np.testing.assert_array_equal(of.plan.ratios[kept], slots["prune_ratio"][kept])
    np.testing.assert_array_equal(of.plan.ratios[of.plan.devices], allocation.prune_ratio[of.plan.admitted_places])


def test_of_several_bits_those_are_chosen_that_learn_most_in_the_time() -> None:
    setup = make_setup("payload.bits=[2,4,8,32]", "deadline.fraction=0.3")
    beliefs = truth_of(setup, choose_roster(setup, 0, setup.initial.slots))
    seen = set()
    for rounding in (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0, 1e5):
        slots = {**setup.initial.slots, "rounding": np.array(rounding)}
        problems = round_problems(setup.blueprint, beliefs, 0, slots)
        bits, allocation = choose(setup.experiment, problems, 0, slots)
        worth = {}
        for width, problem in problems.by_bits.items():
            kept = 1 - setup.experiment.allocator.solve(problem, 0, 0).prune_ratio
            omega = 0.0 if width == 32 else rounding / (2 ** (width - 1) - 1) ** 2
            worth[width] = (problem.weight @ kept) / (1 + omega / len(kept))
        assert worth[bits] == pytest.approx(max(worth.values()))
        assert allocation.deadline_s == problems.reference.deadline_s
        seen.add(bits)
    assert len(seen) >= 3


def test_bits_that_stretch_the_deadline_lose_to_those_that_keep_it() -> None:
    setup = make_setup("payload.bits=[4,32]", "deadline.fraction=0.3", "pruner.max_ratio=0.5")
    beliefs = truth_of(setup, choose_roster(setup, 0, setup.initial.slots))
    slots = {**setup.initial.slots, "rounding": np.array(1e9)}  # four bits would teach next to nothing
    problems = round_problems(setup.blueprint, beliefs, 0, slots)
    deadlines = {bits: setup.experiment.allocator.solve(of, 0, 0).deadline_s for bits, of in problems.by_bits.items()}
    assert deadlines[4] == problems.reference.deadline_s < deadlines[32]
    assert choose(setup.experiment, problems, 0, slots)[0] == 4


def test_the_record_is_the_stages_figures_by_hand() -> None:
    of = stages()
    record, samples, devices = of.step.record, of.setup.scenario.partition.train.sizes, of.plan.devices
    own, rows = samples[devices] / samples[devices].sum(), of.step.record.devices
    u, masks = of.state.shared.astype(float), of.work.masks
    everybody = [*devices.tolist(), *of.roster.frozen.tolist()]
    assert rows.id == everybody
    errors = [float(np.square(u[~masks[device]]).sum()) for device in everybody]
    np.testing.assert_allclose(rows.pruning_error, errors, rtol=1e-6)
    assert record.pruning_error == pytest.approx(own @ errors[: len(devices)], rel=1e-6)
    alive = [update for update in of.results.updates if update.train_loss is not None]
    assert len(alive) == (~of.work.fates.died).sum() < len(of.results.updates)
    losses = np.array([update.train_loss for update in alive])
    weight = samples[[update.device for update in alive]]
    assert record.train_loss == pytest.approx(losses @ weight / weight.sum())
    rounding = [update.rounding_error for update in alive]
    assert record.rounding_error == pytest.approx(np.mean(rounding))
    reference, count = of.plan.reference, len(of.plan.reference.weight)
    equal_hz = np.full(count, reference.bandwidth_hz / count)
    equal_s = reference.shared_compute_s + reference.payload_bits / rate(equal_hz, reference.snr_hz) + reference.fixed_s
    assert record.equal_dense_latency_s == pytest.approx(equal_s.max())
    assert record.dense_latency_s == pytest.approx(dense_deadline(reference)[0])
    ratio = of.plan.allocation.prune_ratio[of.plan.admitted_places]
    assert (record.mean_ratio, record.max_ratio) == (pytest.approx(ratio.mean()), ratio.max())
    assert record.latency_s >= of.bill.personal_s
    assert record.faults is not None
    dead = devices[of.work.fates.died].tolist()
    assert record.faults.died == dead
    for device in dead:
        np.testing.assert_array_equal(of.step.after.personal[device], of.state.personal[device])


def test_the_new_u_is_the_mean_of_what_arrived_and_its_norm_that_of_the_mean_gradient() -> None:
    of = stages()
    old, lr = of.state.shared.astype(float), of.setup.experiment.training.lr
    total, pull, weight = (np.zeros(old.size) for _ in range(3))
    for update, died in zip(of.results.updates, of.work.fates.died, strict=True):
        if died:
            continue
        mask, samples = of.work.masks[update.device], of.setup.scenario.partition.train.sizes[update.device]
        (steps,) = [phase.steps for phase in of.setup.schedule(update.device) if phase.kind == "shared"]
        total[mask] += samples * update.shared
        pull[mask] += samples * (old[mask] - update.shared) / (lr * steps)
        weight[mask] += samples
    kept = weight > 0
    assert not kept.all()
    np.testing.assert_allclose(of.step.after.shared[kept], total[kept] / weight[kept], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(of.step.after.shared[~kept], of.state.shared[~kept])
    assert of.step.record.grad_norm == pytest.approx(np.linalg.norm(pull[kept] / weight[kept]), rel=1e-4)


def test_a_round_lasts_until_the_last_frozen_device_is_done() -> None:
    of = stages()
    slow = dataclasses.replace(of.setup.scenario.fleet, cpu_hz=of.setup.scenario.fleet.cpu_hz.copy())
    slow.cpu_hz[of.roster.frozen[0]] /= 1e6
    setup = dataclasses.replace(of.setup, scenario=dataclasses.replace(of.setup.scenario, fleet=slow))
    with executor(setup.experiment.execution, lambda: build_learner(setup.experiment, setup.scenario)) as workers:
        state, record = round_step(setup, of.state, workers)
    slowest = record.devices.latency_s[len(of.plan.devices)]
    assert record.latency_s == max(record.devices.latency_s) == slowest
    assert float(state.slots["simulated_s"]) == pytest.approx(float(of.state.slots["simulated_s"]) + slowest)


def test_an_arrival_counts_by_samples_age_and_the_sizes_of_its_steps() -> None:
    setup = make_setup("method=proposed", "training.epochs=2", "partition.alpha=0.2")
    for device in range(4):
        samples = setup.scenario.partition.train.sizes[device]
        (shared_steps,) = [phase.steps for phase in setup.schedule(device) if phase.kind == "shared"]
        for age in (0, 3):
            added = contribution(setup, Arrival(device, np.ones(2, bool), np.zeros(2, np.float32), age))
            assert added.weight == pytest.approx(samples / (1 + age))
            assert added.step_size == pytest.approx(setup.experiment.training.lr * shared_steps)
    both = make_setup("method=fedsim")
    steps = sum(phase.steps for phase in both.schedule(0) if phase.kind == "both")
    added = contribution(both, Arrival(0, np.ones(2, bool), np.zeros(2, np.float32)))
    assert added.step_size == pytest.approx(both.experiment.training.lr * steps)
    assert steps


@pytest.mark.parametrize("options", [(), ("method=pruned", "pruner=taylor")])
def test_the_tested_model_is_the_devices_own(options: tuple[str, ...]) -> None:
    """Another reference for the accuracies: plain PyTorch on (u * m_k, v_k), and for fresh devices v after its own steps on all of u."""
    import torch

    from fedprune_cli.learn.client import samples as batch_of

    setup = make_setup("deadline.fraction=0.2", "rounds=2", "devices.fresh=3", *options)
    last, scenario = steps_of(setup, 2)[-1], setup.scenario
    learner = build_learner(setup.experiment, scenario)
    roster = choose_roster(setup, last.before.round, last.before.slots)
    masks = assign(setup, last.before, roster, plan_round(setup, roster, last.before.slots)).masks
    assert max(last.record.devices.prune_ratio) > 0.3

    def accuracy(device: int, shared: Array, personal: Array) -> float:
        learner.parts.make_whole()
        learner.parts.shared.copy_(torch.from_numpy(shared))
        learner.parts.personal.copy_(torch.from_numpy(personal))
        x, y = batch_of(learner, scenario.partition.test[device])
        with torch.no_grad():
            return float((learner.parts.model(x).argmax(1) == y).float().mean())

    own = np.array([accuracy(k, last.after.shared * masks[k], last.after.personal[k]) for k in range(4)])
    weight = scenario.partition.train.sizes[:4]
    assert last.record.accuracy == pytest.approx(own @ weight / weight.sum())
    assert last.record.accuracy_mean == pytest.approx(own.mean())
    assert last.record.devices.accuracy == pytest.approx(own.tolist())
    unpruned = np.array([accuracy(k, last.after.shared, last.after.personal[k]) for k in range(4)])
    assert (own != unpruned).any()
    before = [accuracy(k, last.after.shared, setup.initial.personal.initial) for k in range(4, 7)]
    if setup.blueprint.cost.personal_params:
        assert last.record.fresh_accuracy != pytest.approx(np.mean(before))  # after steps of their own
    else:
        assert last.record.fresh_accuracy == pytest.approx(np.mean(before))


def test_whoever_was_asked_hears_the_broadcast_also_when_it_is_turned_away() -> None:
    setup = make_setup(
        "devices.count=8", "rounds=4", "deadline.fraction=0.35", "pruner.max_ratio=0.3", "allocator.on_infeasible=drop"
    )
    told = 0
    for step in steps_of(setup, 4):
        asked = choose_roster(setup, step.before.round, step.before.slots).training
        gain, ids = setup.scenario.at(step.before.round).gain_linear, step.record.devices.id
        channel, size = setup.scenario.channel, setup.blueprint.cost.shared_params
        snr = channel.bs_power_w * gain[asked].min() / (channel.noise_w_per_hz * channel.bandwidth_hz)
        np.testing.assert_allclose(
            step.record.devices.downlink_s, 32 * size / (channel.bandwidth_hz * np.log2(1 + snr))
        )
        told += bool(ids) and gain[ids].min() > gain[asked].min()
    assert told
