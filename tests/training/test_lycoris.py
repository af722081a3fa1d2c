from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork
from safetensors.torch import load_file
from torch import Tensor, nn
from training_fakes import Family, answer, base_answer, make_run, stir

from simpletuner.errors import UserError
from simpletuner.training.lycoris import Lycoris
from simpletuner.training.tuning import build_tuning

LOKR = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 2}
LOHA = {"algo": "loha", "linear_dim": 2, "linear_alpha": 1}
LOCON = {"algo": "locon", "linear_dim": 2, "linear_alpha": 1}
FULL = {"algo": "full"}
DECOMPOSED, REBUILT = {"dora_wd": True}, {"bypass_mode": False}


def tuned(folder: Path, config: Any = LOKR, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Lycoris]:
    denoiser = Family().load_denoiser(dtype)
    run = make_run(folder, lora_type="lycoris", lycoris_config=config, **options)
    return denoiser, Lycoris(Family(), denoiser, run)  # type: ignore[arg-type]


def with_weights(change: Any) -> Tensor:
    """What the base answers in float64 when `change(name)` is added to each weight."""
    denoiser = Family().load_denoiser().double().requires_grad_(False)
    for name, layer in (("to_q", denoiser.to_q), ("to_out_0", denoiser.to_out[0]), ("text", denoiser.text)):
        layer.weight += change(f"lycoris_{name}")
    return answer(denoiser)


class Single(nn.Module):
    """A denoiser of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


# the formulas


@pytest.mark.parametrize("options", [{}, {"bypass_mode": False}], ids=["added", "rebuilt"])
def test_lokr_adds_the_kronecker_product_of_its_factors(tmp_path: Path, options: dict[str, Any]) -> None:
    denoiser, tuning = tuned(tmp_path, LOKR | options)
    stir(tuning)
    weights = {name: tensor.double() for name, tensor in tuning.weights().items()}
    expected = with_weights(lambda name: torch.kron(weights[f"{name}.lokr_w1"], weights[f"{name}.lokr_w2"]))
    with tuning.evaluating():
        torch.testing.assert_close(answer(denoiser), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"bypass_mode": False}], ids=["added", "rebuilt"])
def test_loha_counts_alpha_over_rank_once(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its merge counts it twice (lycoris-lora 4.1.3)."""
    denoiser, tuning = tuned(tmp_path, LOHA | options)
    stir(tuning)
    weights = {name: tensor.double() for name, tensor in tuning.weights().items()}

    def change(name: str) -> Tensor:
        first, second = (weights[f"{name}.hada_w{n}_a"] @ weights[f"{name}.hada_w{n}_b"] for n in (1, 2))
        return first * second / 2

    with tuning.evaluating():
        torch.testing.assert_close(answer(denoiser), with_weights(change), atol=1e-5, rtol=1e-4)


def test_locon_is_lora_and_the_multiplier_scales_it(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path, LOCON | {"multiplier": 0.5})
    stir(tuning)
    weights = {name: tensor.double() for name, tensor in tuning.weights().items()}
    expected = with_weights(lambda name: weights[f"{name}.lora_up.weight"] @ weights[f"{name}.lora_down.weight"] / 4)
    with tuning.evaluating():
        torch.testing.assert_close(answer(denoiser), expected, atol=1e-5, rtol=1e-4)


def test_a_grouped_convolution_gets_the_whole_of_its_adapter(tmp_path: Path) -> None:
    class Depthwise(Family):
        lycoris_presets = {**Family.lycoris_presets, "full": ("Conv2d",)}  # noqa: RUF012

        def load_denoiser(self, dtype: torch.dtype = torch.float32) -> nn.Module:
            torch.manual_seed(0)
            return Single(nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval()

    x_BCHW = torch.randn(1, 8, 4, 4)
    for config in (LOKR, LOHA, LOCON):
        run = make_run(tmp_path, lora_type="lycoris", lycoris_config=config)
        ours, theirs = Depthwise().load_denoiser(), Depthwise().load_denoiser()
        tuning = Lycoris(Depthwise(), ours, run)  # type: ignore[arg-type]
        stir(tuning)
        from lycoris import create_lycoris_from_weights

        file = tuning.save_result(tmp_path)
        create_lycoris_from_weights(1.0, str(file), theirs)[0].apply_to()
        assert not torch.allclose(ours(x_BCHW), Depthwise().load_denoiser()(x_BCHW), atol=1e-2)
        torch.testing.assert_close(ours(x_BCHW), theirs(x_BCHW), atol=1e-5, rtol=1e-4)


HALF = [LOKR, LOHA, LOCON, FULL, *({**each, **how} for each in (LOKR, LOHA, LOCON) for how in (DECOMPOSED, REBUILT))]


@pytest.mark.parametrize("config", HALF, ids=lambda config: "-".join([config["algo"], *list(config)[3:]]))
def test_a_small_change_is_not_rounded_away_in_a_bfloat16_base(tmp_path: Path, config: dict[str, Any]) -> None:
    """The library rebuilds weights in the base's format: it loses what is under their last bit, or fails (4.1.3)."""
    layer = nn.Linear(4, 8, bias=False).requires_grad_(False)
    nn.init.constant_(layer.weight, 1.0)  # the next bfloat16 is 1.0078

    class One(Family):
        def load_denoiser(self, dtype: torch.dtype = torch.float32) -> nn.Module:
            return Single(layer).to(dtype)

    denoiser = One().load_denoiser(torch.bfloat16)
    tuning = Lycoris(One(), denoiser, make_run(tmp_path, lora_type="lycoris", lycoris_config=config))  # type: ignore[arg-type]
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.bfloat16)  # the base answers 0
    for name, parameter in tuning.parameters().items():
        if name.endswith("dora_scale"):
            continue
        size = 1e-3 if config is FULL else 0.03  # the others multiply their factors
        parameter.data.fill_(size)
        parameter.data[..., 0] = 2 * size
    assert 0 < denoiser(x).abs().max() < 0.0039


# what is trained


def test_a_lycoris_run_trains_the_adapters_and_nothing_else(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path)
    stir(tuning)
    answer(denoiser).sum().backward()
    trained = [parameter for parameter in denoiser.parameters() if parameter.grad is not None]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in tuning.parameters().values()}
    assert not denoiser.to_out[1].training


def test_the_base_is_saved_without_the_adapter(tmp_path: Path) -> None:
    denoiser, _ = tuned(tmp_path)
    base = Family().load_denoiser().state_dict()
    assert denoiser.state_dict().keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in denoiser.state_dict().items())


def test_the_librarys_choice_of_layers_does_not_leak_into_the_next_build(tmp_path: Path) -> None:
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    preset = {"target_module": ["Linear"], "module_algo_map": {"Linear": {"factor": 4}}, "exclude_name": ["text"]}
    _, chosen = tuned(tmp_path, LOKR | {"apply_preset": preset})
    assert {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()} == before
    _, plain = tuned(tmp_path)
    assert {name.partition(".")[0] for name in chosen.weights()} == {"lycoris_to_q", "lycoris_to_out_0"}
    assert {name.partition(".")[0] for name in plain.weights()} == {"lycoris_to_q", "lycoris_to_out_0", "lycoris_text"}
    assert chosen.weights()["lycoris_to_q.lokr_w2"].shape != plain.weights()["lycoris_to_q.lokr_w2"].shape


def test_classes_and_names_may_have_algorithms_of_their_own(tmp_path: Path) -> None:
    preset = {"target_module": [], "target_name": ["text"], "name_algo_map": {"to_q": {"algo": "loha", "dim": 3, "alpha": 2}}}
    _, tuning = tuned(tmp_path, LOCON | {"apply_preset": preset})
    weights = tuning.weights()
    assert {name.partition(".")[0] for name in weights} == {"lycoris_to_q", "lycoris_text"}
    assert weights["lycoris_to_q.hada_w1_b"].shape == (3, 4)
    assert weights["lycoris_to_q.alpha"] == 2
    assert weights["lycoris_text.lora_down.weight"].shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [LOKR, LOHA, LOCON, FULL], ids=lambda config: config["algo"])
def test_disabled_is_the_base_bit_for_bit(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    denoiser, tuning = tuned(tmp_path, config, dtype)
    stir(tuning)
    with tuning.disabled(), torch.no_grad():
        assert torch.equal(answer(denoiser), base_answer(dtype))
    assert not torch.allclose(answer(denoiser), base_answer(dtype), atol=1e-2)


@pytest.mark.parametrize("config", [LOKR, LOHA, LOCON, FULL, LOCON | {"dora_wd": True}], ids=str)
def test_at_half_strength_it_is_an_adapter_of_half_the_multiplier(tmp_path: Path, config: dict[str, Any]) -> None:
    denoiser, tuning = tuned(tmp_path, config | {"multiplier": 0.8})
    stir(tuning)
    halved, other = tuned(tmp_path, config | {"multiplier": 0.4})
    other.load(tuning.weights())
    with tuning.evaluating(), other.evaluating():
        whole = answer(denoiser)
        with tuning.at_strength(0.5):
            assert torch.equal(answer(denoiser), answer(halved))
        assert torch.equal(answer(denoiser), whole)
        assert not torch.allclose(whole, answer(halved), atol=1e-3)


@pytest.mark.parametrize("dropout", ["dropout", "rank_dropout", "module_dropout"])
@pytest.mark.parametrize("config", [LOKR, LOHA, LOCON, FULL], ids=lambda config: config["algo"])
def test_each_dropout_acts_in_training_and_never_in_evaluation(tmp_path: Path, config: dict[str, Any], dropout: str) -> None:
    denoiser, tuning = tuned(tmp_path, config | {dropout: 0.5})
    stir(tuning)
    answers = [answer(denoiser) for _ in range(12)]
    assert any(not torch.equal(answers[0], other) for other in answers)
    with tuning.evaluating():
        assert torch.equal(answer(denoiser), answer(denoiser))


def test_a_dropped_module_has_a_gradient_of_nothing_so_that_ranks_need_not_wait_for_it(tmp_path: Path) -> None:
    denoiser, tuning = tuned(tmp_path, LOKR | {"module_dropout": 0.999})
    stir(tuning)
    answer(denoiser).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tuning.parameters().values())


def test_an_adapters_start_follows_from_the_seed_alone(tmp_path: Path) -> None:
    def start(seed: int) -> Tensor:
        torch.rand(1)
        return tuned(tmp_path, seed=seed)[1].weights()["lycoris_to_q.lokr_w1"]

    state = torch.get_rng_state()
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    torch.set_rng_state(state)
    tuned(tmp_path)
    assert torch.equal(torch.get_rng_state(), state), "building an adapter draws from training's generator"


def test_adapters_are_kept_in_the_trained_format_whatever_the_bases(tmp_path: Path) -> None:
    for trained in ("float32", "bfloat16"):
        _, tuning = tuned(tmp_path, LOKR, torch.bfloat16, trained=trained)
        assert {parameter.dtype for parameter in tuning.parameters().values()} == {getattr(torch, trained)}


# names


def test_classes_that_the_denoiser_lacks_are_told_and_the_rest_is_trained(tmp_path: Path) -> None:
    _, tuning = tuned(tmp_path, LOKR | {"apply_preset": {"target_module": ["Linear", "FeedForward"]}})
    [notice] = tuning.notices
    assert "names FeedForward, which this denoiser does not have. Its classes: Denoiser, Dropout, Linear, ModuleList." in notice


def test_a_config_that_matches_no_layer_is_refused_with_the_classes_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"matches no layer of Denoiser(.|\n)*Dropout, Linear(.|\n)*Linea -> Linear"):
        tuned(tmp_path, LOKR | {"apply_preset": {"target_module": ["Linea"]}})


def test_settings_without_effect_are_told(tmp_path: Path) -> None:
    _, tuning = tuned(tmp_path, FULL | {"linear_dim": 8, "factor": 4})
    assert tuning.notices == ("lycoris_config: factor, linear_dim has no effect with this algorithm.",)


# on disk


def test_the_settings_lie_beside_the_weights_with_every_default_filled_in(tmp_path: Path) -> None:
    file = tuned(tmp_path, {"algo": "loha"})[1].save_result(tmp_path / "made")
    assert file == tmp_path / "made" / "pytorch_lora_weights.safetensors"
    assert json.loads((tmp_path / "made" / "lycoris_config.json").read_text()) == {
        "algo": "loha",
        "multiplier": 1.0,
        "linear_dim": 4,
        "linear_alpha": 1,
        "conv_dim": 4,
        "conv_alpha": 1,
        "apply_preset": {"target_module": ["Linear"]},
    }
    again = tuned(tmp_path, json.loads((tmp_path / "made" / "lycoris_config.json").read_text()))[1]
    assert again.weights().keys() == load_file(file).keys()


@pytest.mark.parametrize("config", [LOKR, LOHA, LOCON], ids=lambda config: config["algo"])
def test_names_on_disk_are_the_librarys_own(tmp_path: Path, config: dict[str, Any]) -> None:
    denoiser, tuning = tuned(tmp_path, config)
    network = denoiser.get_submodule("lycoris_adapters")
    assert tuning.weights().keys() == network.state_dict().keys()


@pytest.mark.parametrize("config", [LOKR, LOHA, LOCON, FULL], ids=lambda config: config["algo"])
def test_a_run_can_begin_with_a_finished_adapter(tmp_path: Path, config: dict[str, Any]) -> None:
    first, made = tuned(tmp_path, config, seed=1)
    stir(made)
    file = made.save_result(tmp_path / "first")
    for start in (file, file.parent):
        second, tuning = tuned(tmp_path, config, seed=2, init_lora=str(start))
        with made.evaluating(), tuning.evaluating():
            assert torch.equal(answer(first), answer(second))


def test_an_adapter_of_another_size_alpha_or_kind_is_refused(tmp_path: Path) -> None:
    tuned(tmp_path, LOHA)[1].save_result(tmp_path / "loha")
    build_tuning(Family(), Family().load_denoiser(), make_run(tmp_path)).save_result(tmp_path / "lora")  # type: ignore[arg-type]
    for config, source, words in (
        (LOHA | {"linear_dim": 3}, "loha", r"hada_w1_a is \(\d, 2\) there and \(\d, 3\) here"),
        (LOHA | {"linear_alpha": 2}, "loha", r"was trained with lycoris_\w+\.alpha 1, but here it is 2"),
        (LOKR, "loha", "have no place here"),
        (LOHA, "lora", r'is no LyCORIS adapter(.|\n)*set "lora_type" to "standard"'),
    ):
        with pytest.raises(UserError, match=words):
            tuned(tmp_path, config, init_lora=str(tmp_path / source))
