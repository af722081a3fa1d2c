from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from training_fakes import Family, answer, base_answer, make_run, stir

from simpletuner.errors import UserError
from simpletuner.training.lora import Lora
from simpletuner.training.tuning import build_tuning


def tuned(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Lora]:
    denoiser = Family().load_denoiser(dtype)
    tuning = build_tuning(Family(), denoiser, make_run(folder, **options))
    assert isinstance(tuning, Lora)
    return denoiser, tuning


def test_lora_trains_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path)
    answer(denoiser).sum().backward()
    got = {name for name, parameter in denoiser.named_parameters() if parameter.grad is not None}
    assert got == {name for name, parameter in denoiser.named_parameters() if "lora_" in name}
    assert len(got) == len(tuning.parameters()) == 4


def test_lora_names_are_those_that_stock_loaders_read(tmp_path: Path) -> None:
    _, tuning = tuned(tmp_path)
    layers = ("to_out.0", "to_q")
    assert sorted(tuning.parameters()) == [f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"]


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path)
    with tuning.evaluating():
        assert torch.equal(answer(denoiser), base_answer())
        stir(tuning)
        assert not torch.allclose(answer(denoiser), base_answer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_is_the_base_bit_for_bit_and_training_goes_on_after_it(tmp_path: Path, dtype: torch.dtype) -> None:
    denoiser, tuning = tuned(tmp_path, dtype, lora_dropout=0.5)
    stir(tuning)
    with tuning.disabled(), torch.no_grad():
        assert torch.equal(answer(denoiser), base_answer(dtype))
    answer(denoiser).sum().backward()
    assert all(parameter.grad is not None for parameter in tuning.parameters().values())


def test_the_base_under_an_adapter_never_drops_out_but_the_adapter_does(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path, lora_dropout=0.5)
    assert not denoiser.to_out[1].training
    stir(tuning)
    assert not torch.equal(answer(denoiser), answer(denoiser))
    with tuning.evaluating():
        assert torch.equal(answer(denoiser), answer(denoiser))
    assert not torch.equal(answer(denoiser), answer(denoiser))


def test_adapters_are_kept_in_the_trained_format_whatever_the_bases(tmp_path: Path) -> None:
    for trained in ("float32", "bfloat16"):
        _, tuning = tuned(tmp_path, torch.bfloat16, trained=trained)
        assert {parameter.dtype for parameter in tuning.parameters().values()} == {getattr(torch, trained)}


def test_an_adapters_start_follows_from_the_seed_alone(tmp_path: Path) -> None:
    def start(seed: int) -> Tensor:
        torch.rand(1)
        return tuned(tmp_path, seed=seed)[1].weights()["to_q.lora_A.weight"]

    state = torch.get_rng_state()
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    torch.set_rng_state(state)
    torch.rand(4)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    for _ in range(4):
        start(1)
    assert torch.equal(torch.get_rng_state(), after), "building an adapter draws from training's generator"


def test_gaussian_start_has_the_width_that_peft_documents(tmp_path: Path) -> None:
    _, tuning = tuned(tmp_path, lora_init_type="gaussian", lora_rank=64)
    assert tuning.weights()["to_q.lora_A.weight"].std().item() == pytest.approx(1 / 64, rel=0.2)
    assert not tuning.weights()["to_q.lora_B.weight"].any()


def test_alpha_over_rank_scales_the_adapter(tmp_path: Path) -> None:
    differences = []
    for alpha in (2.0, 4.0):
        denoiser, tuning = tuned(tmp_path, lora_alpha=alpha)
        with torch.no_grad():
            tuning.parameters()["to_out.0.lora_B.weight"].fill_(0.01)
        with tuning.evaluating():
            differences.append(answer(denoiser) - base_answer())
    torch.testing.assert_close(differences[1], 2 * differences[0])


def test_a_saved_adapter_brings_its_config_so_that_alpha_is_not_taken_for_the_rank(tmp_path: Path) -> None:
    _, tuning = tuned(tmp_path, lora_alpha=1.0)
    with safe_open(tuning.save_result(tmp_path), "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (2, 1.0)
    assert config["transformer.target_modules"] == ["to_out.0", "to_q"]


def test_a_saved_adapter_asks_for_no_dropout_which_stock_pipelines_would_apply_when_painting(tmp_path: Path) -> None:
    _, tuning = tuned(tmp_path, lora_dropout=0.5)
    with safe_open(tuning.save_result(tmp_path), "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_dropout"] == 0


def test_a_run_can_begin_with_a_finished_adapter(tmp_path: Path) -> None:
    first, made = tuned(tmp_path, seed=1)
    stir(made)
    made.save_result(tmp_path / "first")
    second, tuning = tuned(tmp_path, seed=2, init_lora=str(tmp_path / "first"))
    with made.evaluating(), tuning.evaluating():
        assert torch.equal(answer(first), answer(second))


def test_an_adapter_of_another_rank_is_refused_with_both_numbers(tmp_path: Path) -> None:
    tuned(tmp_path, lora_rank=3)[1].save_result(tmp_path)
    with pytest.raises(UserError, match=r"has rank 3, but lora_rank is 2(.|\n)*Mend: set \"lora_rank\" to 3"):
        tuned(tmp_path, init_lora=str(tmp_path))


def test_an_adapter_of_another_alpha_is_refused_since_it_would_count_more_or_less(tmp_path: Path) -> None:
    tuned(tmp_path, lora_alpha=8.0)[1].save_result(tmp_path)
    with pytest.raises(
        UserError, match=r"lora_alpha 8, but lora_alpha is 2(.|\n)*0\.25 times(.|\n)*Mend: set \"lora_alpha\" to 8"
    ):
        tuned(tmp_path, init_lora=str(tmp_path))


def test_an_adapter_of_other_layers_is_refused_with_their_names(tmp_path: Path) -> None:
    weights = tuned(tmp_path)[1].weights()
    weights["to_x.lora_A.weight"] = weights.pop("to_q.lora_A.weight")
    with pytest.raises(UserError, match=r"first to_x\.lora_A\.weight(.|\n)*first to_q\.lora_A\.weight"):
        tuned(tmp_path)[1].load(weights)


def test_target_presets_and_names_choose_the_layers(tmp_path: Path) -> None:
    for options, layers in (
        ({"lora_target_preset": "text"}, {"text"}),
        ({"peft_lora_target_modules": ("to_out.0", "text")}, {"to_out.0", "text"}),
    ):
        _, tuning = tuned(tmp_path, **options)
        assert {name.partition(".lora_")[0] for name in tuning.parameters()} == layers


def test_a_target_that_is_no_layer_is_refused_with_the_names_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names to_qq, to_out, which(.|\n)*text, to_out\.0, to_q(.|\n)*\"to_q\" for \"to_qq\""):
        tuned(tmp_path, peft_lora_target_modules=("to_qq", "to_out", "text"))


# DoRA


def test_dora_trains_the_lengths_of_rows_under_the_name_that_stock_loaders_read(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path, use_dora=True)
    weight = Family().load_denoiser().to_q.weight
    lengths = tuning.parameters()["to_q.lora_magnitude_vector"]
    torch.testing.assert_close(lengths, weight.norm(dim=1))
    stir(tuning)
    answer(denoiser).sum().backward()
    assert all(parameter.grad is not None for parameter in tuning.parameters().values())


def test_dora_is_the_formula_of_its_paper(tmp_path: Path) -> None:
    """Liu et al. 2024, equation 5: W' = m (W + BA) / |W + BA|, in float64."""
    denoiser, tuning = tuned(tmp_path, use_dora=True, lora_alpha=4.0)
    stir(tuning)
    weights = {name: tensor.double() for name, tensor in tuning.weights().items()}
    base = Family().load_denoiser().double()
    for name, layer in (("to_q", base.to_q), ("to_out.0", base.to_out[0])):
        moved = layer.weight + 2 * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        lengths = weights[f"{name}.lora_magnitude_vector"]
        layer.weight.data = lengths[:, None] * moved / moved.norm(dim=1, keepdim=True)
    with tuning.evaluating():
        torch.testing.assert_close(answer(denoiser), answer(base), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_at_half_strength_the_matrices_count_half_and_afterwards_whole(tmp_path: Path, use_dora: bool) -> None:
    denoiser, tuning = tuned(tmp_path, use_dora=use_dora, lora_alpha=8.0)
    stir(tuning)
    weights = {name: tensor.double() for name, tensor in tuning.weights().items()}
    base = Family().load_denoiser().double()
    for name, layer in (("to_q", base.to_q), ("to_out.0", base.to_out[0])):
        moved = layer.weight + 4 * 0.5 * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
        if use_dora:
            moved *= weights[f"{name}.lora_magnitude_vector"][:, None] / moved.norm(dim=1, keepdim=True)
        layer.weight.data = moved
    with tuning.evaluating():
        whole = answer(denoiser)
        with tuning.at_strength(0.5):
            torch.testing.assert_close(answer(denoiser), answer(base), atol=1e-5, rtol=1e-4)
        assert torch.equal(answer(denoiser), whole)


def test_a_lora_at_no_strength_is_the_base(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path)
    stir(tuning)
    with tuning.evaluating(), tuning.at_strength(0.0):
        torch.testing.assert_close(answer(denoiser), base_answer())


def test_a_dora_is_the_base_while_it_is_off(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path, use_dora=True)
    stir(tuning)
    with tuning.disabled(), torch.no_grad():
        assert torch.equal(answer(denoiser), base_answer())


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True)])
def test_a_lora_is_not_taken_for_a_dora_nor_the_other_way_round(tmp_path: Path, first: bool, second: bool) -> None:
    tuned(tmp_path, use_dora=first)[1].save_result(tmp_path)
    with pytest.raises(UserError, match=rf'Mend: set "use_dora" to {str(first).lower()}'):
        tuned(tmp_path, use_dora=second, init_lora=str(tmp_path))


def test_a_run_can_begin_with_a_finished_dora(tmp_path: Path) -> None:
    first, made = tuned(tmp_path, use_dora=True, seed=1)
    stir(made)
    made.save_result(tmp_path / "first")
    second, tuning = tuned(tmp_path, use_dora=True, seed=2, init_lora=str(tmp_path / "first"))
    with made.evaluating(), tuning.evaluating():
        assert torch.equal(answer(first), answer(second))


def test_a_lycoris_adapter_is_refused_with_the_option_that_takes_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, lora_type="lycoris")
    build_tuning(Family(), Family().load_denoiser(), run).save_result(tmp_path)
    with pytest.raises(UserError, match=r'is a LyCORIS adapter(.|\n)*set "lora_type" to "lycoris"'):
        tuned(tmp_path, init_lora=str(tmp_path))
