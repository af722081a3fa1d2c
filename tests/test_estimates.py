"""Estimates against what a real step, and a real encoder, hold in memory on the CPU, counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.run import Hardware, Run
from simpletuner.data.samples import Place
from simpletuner.estimates import Largest, Stage, Workload, image_stage, item_bytes, memory_of, text_stage, training_stage
from simpletuner.families import find
from simpletuner.networks.counting import PeakBytes, stored_bytes
from simpletuner.networks.quantise import quantise
from simpletuner.training.ema import Ema
from simpletuner.training.optimizers import build_optimizer
from simpletuner.training.tuning import build_tuning

BATCH = 3
TOLERANCE = 0.05


def counted(run: Run) -> tuple[int, int]:
    """What a step in the steady state has lying, and what comes on top: real weights, really computed."""
    family: Any = find()[run.model.model_family](run)
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, run)
    parameters = tuning.parameters()
    optimizer = build_optimizer(run.optimizer, parameters)
    average = [Ema(parameters, decay=0.9, interval=1, device="cpu")] if run.ema.use_ema else []
    embeds: dict[str, torch.Tensor] = {}
    for encoder in family.text_encoders():
        embeds.update(encoder.longest())  # held to what is encoded by tests/e2e/test_text_cache.py
    edge = family.latent.native_edge_px
    cond = family.collate([embeds] * BATCH, [Place((edge, edge), (edge, edge), (0, 0), (edge, edge))] * BATCH)
    x_BCHW = torch.randn(BATCH, family.latent.channels, *family.latent.grid(edge, edge))
    for _ in range(2):  # the first makes the optimiser's state
        with PeakBytes() as memory:
            noisy_BCHW, target_BCHW = x_BCHW + 0, x_BCHW + 0
            answer_BCHW = family.predict(denoiser, noisy_BCHW, torch.full((BATCH,), 0.5), cond)
            (answer_BCHW.float() - target_BCHW).square().mean().backward()
        peak = memory.peak
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    states = [part for state in optimizer.state.values() for part in state.values() if isinstance(part, torch.Tensor)]
    averages = [shadow for each in average for shadow in each.weights().values()] if average else []
    return stored_bytes([*denoiser.parameters(), *denoiser.buffers(), *states, *averages]), peak


def largest(run: Run) -> Largest:
    edge = find()[run.model.model_family](run).latent.native_edge_px
    return Largest((edge, edge), BATCH)


def within(stage: Stage, lying: int, peak: int) -> None:
    assert stage.weights_bytes == pytest.approx(lying, rel=0.02)
    assert stage.work_bytes == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("model_type", ["lora", "full"])
@pytest.mark.parametrize("name", find())
def test_a_step_takes_what_was_estimated(make_run: Callable[..., Run], name: str, model_type: str, checkpointing: bool) -> None:
    run = make_run(
        name,
        model_type=model_type,
        gradient_checkpointing=checkpointing,
        use_ema=True,
        optimizer="torch-adamw",
        learning_rate=1e-4,
    )
    within(training_stage(run, find()[name](run), [largest(run)]), *counted(run))


@pytest.mark.parametrize("name", find())
def test_lent_encoders_take_what_was_estimated(make_run: Callable[..., Run], name: str) -> None:
    run = make_run(name)
    family: Any = find()[name](run)
    for encoder in family.text_encoders():
        stage, network = text_stage(run, encoder, BATCH), encoder.load("cpu")
        with torch.no_grad(), PeakBytes() as memory:
            kept = encoder.rehearse(network, BATCH)
        within(stage, stored_bytes([*network.parameters(), *network.buffers()]), memory.peak)
        del kept
    encoder, edge = family.image_encoder(), family.latent.native_edge_px
    network = encoder.load()
    with encoder.lent("cpu") as encode:
        encode(torch.zeros(1, 3, edge, edge), ["0"])  # loaded; what is encoded next is counted alone
        with PeakBytes() as memory:
            encode(torch.zeros(BATCH, 3, edge, edge), ["0"] * BATCH)
    stage = image_stage(run, encoder, [Largest((edge, edge), 1), largest(run)])
    within(stage, stored_bytes([*network.parameters(), *network.buffers()]), memory.peak)


@pytest.mark.parametrize("options", [{"train_batch_size": 1, "gradient_accumulation_steps": 2}, {"set_grads_to_none": False}])
def test_gradients_that_are_kept_lie_beside_the_activations(make_run: Callable[..., Run], options: dict[str, Any]) -> None:
    stages = []
    for each in ({}, options):
        run = make_run("sana", model_type="full", optimizer="torch-adamw", **each)
        stages.append(training_stage(run, find()["sana"](run), [largest(run)]))
    plain, kept = stages
    gradients = sum(weight.numel() * 4 for weight in find()["sana"](run).load_denoiser().parameters())
    assert plain.work_bytes < kept.work_bytes <= plain.work_bytes + gradients


def test_few_bits_and_offloading_take_their_share_off_the_device(make_run: Callable[..., Run]) -> None:
    def stage(**options: Any) -> Stage:
        run = make_run("sd3", **{"optimizer": "torch-adamw", **options})
        run = replace(run, hardware=Hardware("cuda", has_bf16=True))
        return training_stage(run, find()["sd3"](run), [largest(run)])

    plain, few, away = stage(), stage(base_model_precision="int8-quanto"), stage(enable_group_offload=True)
    family = find()["sd3"](make_run("sd3"))
    outcome = quantise(family.load_denoiser(), "int8-quanto", keep=family.kept_whole)
    assert plain.weights_bytes - few.weights_bytes == pytest.approx(outcome.bytes_before - outcome.bytes_after, rel=0.1)
    assert away.weights_bytes < plain.weights_bytes
    assert away.ram_bytes > plain.weights_bytes - away.weights_bytes - 1
    paged = stage(optimizer="bnb-adamw-paged", use_ema=True, ema_device="cpu")
    assert paged.weights_bytes < stage(optimizer="bnb-adamw", use_ema=True).weights_bytes


def test_the_largest_stage_rules_and_a_cpu_has_no_memory_of_its_own(make_run: Callable[..., Run]) -> None:
    run = make_run("sana", optimizer="torch-adamw")
    memory = memory_of(run, Workload([largest(run)], encoded=[largest(run)], prompts=4))
    assert memory.device_bytes == max(stage.weights_bytes + stage.work_bytes for stage in memory.stages)
    assert memory.ram_bytes > memory.device_bytes
    assert memory.otherwise.work_bytes > memory.stages[-1].work_bytes, "without recomputation"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_catalogue_says_what_an_optimiser_keeps_of_a_weight(make_run: Callable[..., Run], name: str) -> None:
    row = OPTIMIZERS[name]
    if row.is_compiled:
        pytest.skip("compiling takes half a minute: benchmarks/memory.py weighs it")
    for dtype, expected in zip((torch.bfloat16, torch.float32), row.state_bytes, strict=True):
        if dtype == torch.bfloat16 and row.trained_dtype != "bfloat16":
            continue
        weight = nn.Parameter(torch.randn(256, 1024).to(dtype))
        optimizer = build_optimizer(make_run("sana", optimizer=name, learning_rate=1e-4).optimizer, {"weight": weight})
        for _ in range(2):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        state = [part for part in optimizer.state[weight].values() if isinstance(part, torch.Tensor) and part.numel() > 1]
        assert stored_bytes(state) / weight.numel() == pytest.approx(expected, rel=0.02, abs=0.04)


def test_each_set_counts_with_its_own_batch_and_what_is_judged_as_a_forward_pass_alone(make_run: Callable[..., Run]) -> None:
    run = make_run("sana", optimizer="torch-adamw")
    family = find()["sana"](run)
    small, many = Largest((64, 64), 2), Largest((64, 64), 16)
    of_many = training_stage(run, family, [many])
    assert training_stage(run, family, [small, many, Largest((128, 128), 1)]) == of_many
    assert training_stage(run, family, [many], [small]) == of_many, "judging few takes less than training"
    judged = training_stage(run, family, [small], [Largest((64, 64), 512)])
    assert judged.work_bytes > training_stage(run, family, [small]).work_bytes
    assert judged.work_bytes < training_stage(run, family, [Largest((64, 64), 512)]).work_bytes


def test_encoders_that_stay_lie_beside_the_training(make_run: Callable[..., Run]) -> None:
    run = make_run("sd3", optimizer="torch-adamw")
    work = Workload([largest(run)], encoded=[largest(run)], prompts=4)
    cached = memory_of(run, work)
    *lent, training = cached.stages
    text = run.text_embeds.model_copy(update={"text_cache_disable": True})
    live = memory_of(replace(run, text_embeds=text), replace(work, is_live=True, held_bytes=1000))
    assert cached.staying == ()
    assert live.staying == tuple(stage.name for stage in lent)
    assert live.training.weights_bytes == training.weights_bytes + sum(stage.weights_bytes for stage in lent)
    assert live.training.work_bytes >= max(stage.work_bytes for stage in lent)
    assert live.otherwise.weights_bytes == live.training.weights_bytes
    assert [stage.weights_bytes for stage in live.stages[:2]] == [lent[0].weights_bytes, sum(s.weights_bytes for s in lent[:2])]
    assert live.training.ram_bytes == training.ram_bytes + 1000
    ondemand = memory_of(replace(run, text_embeds=run.text_embeds.model_copy(update={"text_cache_ondemand": True})), work)
    assert ondemand.staying == live.staying[:-1], "pictures are cached ahead"


def test_what_encodes_image_prompts_is_counted(make_run: Callable[..., Run]) -> None:
    run = make_run("stable_cascade", optimizer="torch-adamw", stable_cascade_image_embed_probability=0.5)
    asked = find()["stable_cascade"](run).image_prompts()
    assert asked is not None
    encoder: Any = asked[0]
    network = encoder.load()
    with encoder.lent("cpu") as encode:
        made = encode(torch.zeros(BATCH, 3, 128, 128), ["0"] * BATCH)
    prepared = encoder.processor([Image.new("RGB", (128, 128))] * BATCH, return_tensors="pt").pixel_values
    with torch.no_grad(), PeakBytes() as memory:
        kept = torch.zeros(BATCH, 3, 128, 128), network(prepared.clone())
    within(
        image_stage(run, encoder, [Largest((128, 128), BATCH)]),
        stored_bytes([*network.parameters(), *network.buffers()]),
        memory.peak,
    )
    del kept
    assert item_bytes(encoder) == made[0].nbytes
    names = [one.name for one in memory_of(run, Workload([largest(run)], encoded=[largest(run)])).stages]
    assert sum("CLIPVision" in name for name in names) == 1
