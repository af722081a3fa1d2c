from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_fakes import Family, make_run

from simpletuner.config.run import Hardware, Run
from simpletuner.errors import RunError, UserError
from simpletuner.families import load as load_family
from simpletuner.training import engine as engine_module
from simpletuner.training.engine import Engine, detect_hardware, usable_cores
from simpletuner.training.jobs import Asked
from simpletuner.training.tuning import build_tuning


def with_gradients(*values: float) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor([value])
    return parameters


def left(parameters: list[nn.Parameter]) -> list[float]:
    return [parameter.grad.item() for parameter in parameters if parameter.grad is not None]


def test_the_global_norm_is_clipped_and_told_as_it_was(tmp_path: Path) -> None:
    with Engine(make_run(tmp_path)) as engine:
        parameters = with_gradients(3.0, 4.0)
        assert engine.clip(parameters, 1.0).item() == 5.0
        assert left(parameters) == pytest.approx([0.6, 0.8], rel=1e-5)


def test_the_norm_of_bfloat16_gradients_is_exact(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    weight.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = weight.grad.double().norm().item()
    with Engine(make_run(tmp_path)) as engine:
        assert engine.clip([weight], 1.0).item() == pytest.approx(norm, rel=1e-5)
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.double().norm().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("limit", [0.0, 10.0])
def test_small_gradients_and_a_limit_of_zero_stay_as_they_are(tmp_path: Path, limit: float) -> None:
    with Engine(make_run(tmp_path)) as engine:
        parameters = with_gradients(3.0, 4.0)
        assert engine.clip(parameters, limit).item() == 5.0
        assert left(parameters) == [3.0, 4.0]


def test_each_number_is_cut_by_itself_if_so_asked(tmp_path: Path) -> None:
    with Engine(make_run(tmp_path)) as engine:
        parameters = with_gradients(-3.0, 0.5)
        assert engine.clip(parameters, 1.0, method="value").item() == pytest.approx(9.25**0.5)
        assert left(parameters) == [-1.0, 0.5]
        parameters = with_gradients(3.0, 4.0)
        engine.clip(parameters, 0.0, method="value")
        assert left(parameters) == [3.0, 4.0]


def test_one_process_agrees_with_itself(tmp_path: Path) -> None:
    with Engine(make_run(tmp_path)) as engine:
        assert (engine.rank, engine.ranks) == (0, 1)
        assert engine.gather({"a": 1}) == [{"a": 1}]
        assert engine.agree(Asked(2, save=True)) == Asked(2, save=True)


def test_a_full_memory_is_told_with_what_to_change(tmp_path: Path) -> None:
    def fill() -> None:
        with Engine(make_run(tmp_path, train_batch_size=2)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(RunError, match=r"memory of the device is full(.|\n)*20.00 GiB(.|\n)*train_batch_size"):
        fill()


def test_the_denoiser_stays_bare_for_pipelines(tmp_path: Path) -> None:
    with Engine(make_run(tmp_path)) as engine:
        denoiser = Family().load_denoiser()
        predict = engine.prepare(Family(), denoiser)  # type: ignore[arg-type]
        x_BCHW, t_B, text_BD = torch.randn(2, 4, 3, 3), torch.rand(2), torch.randn(2, 4)
        assert torch.equal(predict(x_BCHW, t_B, {"text_BD": text_BD}), denoiser(x_BCHW, t_B, text_BD))
        assert not denoiser.training, "wrapping it must not put a frozen base into train mode"


def test_accelerates_own_accumulation_does_not_divide_gradients_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with Engine(make_run(tmp_path)) as engine:
        weight = nn.Parameter(torch.ones(1))
        engine.backward((3 * weight).sum())
        assert left([weight]) == [3.0]


def test_a_precision_set_in_the_launcher_is_said_to_be_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with Engine(make_run(tmp_path, mixed_precision="no")) as engine:
        assert '"fp16"' in engine.notices[0]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with Engine(make_run(tmp_path, mixed_precision="bf16")) as engine:
        assert engine.notices == ()


def test_a_strategy_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP"):
        Engine(make_run(tmp_path))


def test_the_cpu_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: SimpleNamespace(total_memory=24 * 2**30))
    assert detect_hardware() == Hardware("cuda", has_bf16=True, memory_bytes=24 * 2**30)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert detect_hardware() == Hardware("cpu", has_bf16=False)


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_containers_quota_counts_not_the_machines_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(engine_module, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert usable_cores() == cores


def test_hardware_can_be_asked_without_importing_accelerate() -> None:
    code = "import sys; from simpletuner.training import engine; engine.detect_hardware(); print('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def sana_gradients(run: Run) -> list[torch.Tensor]:
    """Of one micro-batch of the tiny Sana, as the trainer does it."""
    family: Any = load_family(run)
    denoiser = family.load_denoiser()
    tuning = build_tuning(family, denoiser, run)
    draw = torch.Generator().manual_seed(0)
    cond = family.collate([{"prompt_LD": torch.randn(20, 32, generator=draw)}], [])
    with Engine(run) as engine:
        predict = engine.prepare(family, denoiser)
        with engine.accumulate(last=True):
            engine.backward(predict(torch.randn(1, 32, 4, 4, generator=draw), torch.tensor([0.3]), cond).square().mean())
    return [parameter.grad for parameter in tuning.parameters().values() if parameter.grad is not None]


@pytest.mark.parametrize(
    "options",
    [
        {"enable_group_offload": True},
        {"enable_group_offload": True, "group_offload_blocks_per_group": 2},
        {"dynamo_backend": "eager"},
        {"attention_mechanism": "native-flash"},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_no_gradient(
    request: pytest.FixtureRequest, tmp_path: Path, options: dict[str, Any]
) -> None:
    sana_run = request.getfixturevalue("make_run")  # of conftest: the fakes' own has its name here
    fixed = {"output_dir": str(tmp_path), "lora_dropout": 0.0}
    plain, other = (sana_gradients(sana_run("sana", **fixed, **changes)) for changes in ({}, options))
    assert len(plain) == len(other) > 0
    assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_the_preferred_attention_kernel_serves_forward_and_recomputation(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    sana_run = request.getfixturevalue("make_run")
    names = []
    for mechanism in ("native-flash", "native-math"):
        with Kernels() as kernels:
            sana_gradients(sana_run("sana", output_dir=str(tmp_path), attention_mechanism=mechanism))
        names.append(kernels.names)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names[0]
    assert names[1] == set()


class Kernels(TorchDispatchMode):
    """Notes which fused attention kernels run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.name():
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_tf32_is_for_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []
    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda name: told.append(("matmul", name)))
    monkeypatch.setattr("torch.backends.cudnn", SimpleNamespace(), raising=True)
    for is_disabled, expected in ((False, ("high", True)), (True, ("highest", False))):
        engine = Engine(make_run(tmp_path, disable_tf32=is_disabled))
        assert not told, "nothing of it on the CPU"
        engine.device = "cuda:0"
        engine._set_tf32(False)
        assert (told[-1][1], torch.backends.cudnn.allow_tf32) == ("highest", False)
        monkeypatch.setattr(engine._accelerator, "prepare_model", lambda model, **_: model)
        engine.prepare(Family(), Family().load_denoiser())  # type: ignore[arg-type]
        assert (told[-1][1], torch.backends.cudnn.allow_tf32) == expected
        with engine.encoding():  # what has no cache is encoded between two steps
            assert (told[-1][1], torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert (told[-1][1], torch.backends.cudnn.allow_tf32) == expected
        told.clear()
