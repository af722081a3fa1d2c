"""LyCORIS adapters (LoKr, LoHa, LoCon, whole weights) beside a frozen base, by the library's own modules.

The library chooses the layers and holds the matrices. How they are added is ours: `W x + D x`, where the library's default,
`(W + D) x - W x`, rounds a small D away in a half-precision base. Nothing here merges: LoHa's merge counts alpha twice (4.1.3).
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.config.lycoris import LYCORIS_CONFIG_FILE, effective, settings_of, wasted
from simpletuner.config.run import Run
from simpletuner.config.spelling import nearest
from simpletuner.data.samples import draw_seed
from simpletuner.errors import UserError, require
from simpletuner.families.base import ModelFamily, StateDict
from simpletuner.families.common import ADAPTER_FILE, adapter_file, evaluating, write_safetensors
from simpletuner.training.weights import check_names, copy, on_cpu, shapes

__all__ = ["Lycoris"]

CHILD = "lycoris_adapters"
"""The network's name in the denoiser, so that it moves along and ranks share its gradients."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What the library puts adapters beside."""

MEND = "train the model that it was made for with the lycoris_config that lies beside it, or start without it."


class Lycoris:
    """LyCORIS modules in a frozen base, which stays in `eval`."""

    keeps_base = True

    def __init__(self, family: ModelFamily, denoiser: nn.Module, run: Run) -> None:
        self._denoiser = denoiser
        self._settings = effective(run.adapter, family.lycoris_presets)
        self._rebuilds = self._settings.get("dora_wd", False) or self._settings.get("bypass_mode") is False
        self._is_enabled = True
        denoiser.requires_grad_(False).eval()
        unmatched = _unmatched(self._settings["apply_preset"], denoiser)
        with torch.random.fork_rng(devices=[]):  # the weights are still on the CPU
            torch.manual_seed(draw_seed(run.training.seed, "adapter"))
            self._network = _build(self._settings, denoiser)
        if not self._network.loras:
            raise _nothing_matched(unmatched, denoiser)
        self.notices = tuple(_notices(unmatched, settings_of(run.adapter), denoiser))
        for module in self._network.loras:
            for parameter in module.parameters():
                parameter.data = parameter.data.to(getattr(torch, run.dtypes.trained))
            layer = module.org_module[0]
            layer.forward = partial(self._answer, module, layer.forward)
            self._network.add_module(module.lora_name, module)
        self._network.requires_grad_(True).train()
        denoiser.add_module(CHILD, self._network)
        denoiser.register_state_dict_post_hook(_leave_out)
        named = {f"{module.lora_name}.{name}": each for module, name, each in self._each()}
        self._parameters = {name: each for name, each in named.items() if isinstance(each, nn.Parameter)}
        self._alphas = {name: each for name, each in named.items() if name not in self._parameters}
        if run.adapter.init_lora:
            self.load(_read(Path(run.adapter.init_lora)), f"init_lora {run.adapter.init_lora}")

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._parameters)

    def weights(self, instead: Mapping[str, Tensor] | None = None) -> StateDict:
        return {name: on_cpu(tensor) for name, tensor in {**(instead or self._parameters), **self._alphas}.items()}

    def load(self, weights: Mapping[str, Tensor], source: str = "the file") -> None:
        check_names({**self._parameters, **self._alphas}, weights, source)
        for name, parameter in self._parameters.items():
            if weights[name].shape != parameter.shape:
                raise UserError(f"{source} does not fit this run: {shapes(name, weights[name], parameter)}", mend=MEND)
        for name, alpha in self._alphas.items():
            if weights[name].item() != alpha.item():
                raise UserError(
                    f"{source} was trained with {name} {weights[name].item():g}, but here it is {alpha.item():g}.",
                    why="its matrices would count more or less than they were trained to.",
                    mend='set "linear_alpha" (and "conv_alpha") in lycoris_config to what it was.',
                )
        copy(self._parameters, weights)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._is_enabled = False
        try:
            yield
        finally:
            self._is_enabled = True

    def evaluating(self) -> AbstractContextManager[None]:
        return evaluating(self._denoiser)

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        before = [module.multiplier for module in self._network.loras]
        for module, multiplier in zip(self._network.loras, before, strict=True):
            module.multiplier = multiplier * strength
        try:
            yield
        finally:
            for module, multiplier in zip(self._network.loras, before, strict=True):
                module.multiplier = multiplier

    def save(self, folder: Path, instead: Mapping[str, Tensor] | None = None) -> None:
        self._write(self.weights(instead), folder)

    def read(self, folder: Path) -> StateDict:
        return _read(folder)

    def save_result(self, folder: Path) -> Path:
        return self._write(self.weights(), folder)

    def _write(self, weights: StateDict, folder: Path) -> Path:
        """Both files: the weights under the library's names, and the settings."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n"
        (folder / LYCORIS_CONFIG_FILE).write_text(text, encoding="utf-8")
        return write_safetensors(weights, folder / ADAPTER_FILE, {"format": "pt"})

    def _each(self) -> Iterator[tuple[Any, str, Tensor]]:
        """(module, name on disk, tensor) of all that is saved."""
        from lycoris.modules import FullModule

        for module in self._network.loras:
            on_disk = {"weight": "diff", "bias": "diff_b"} if isinstance(module, FullModule) else {}
            for name, parameter in module.named_parameters():
                yield module, on_disk.get(name, name), parameter
            if "alpha" in dict(module.named_buffers()):
                yield module, "alpha", module.alpha

    def _answer(self, module: Any, original: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """What a layer with an adapter answers. Stands in the place of its `forward`, as the library's would."""
        if not self._is_enabled:
            return original(x, *others, **named)
        if self._rebuilds and not _is_whole_weight(module):
            return original(x, *others, **named) + _rebuilt(module, x)
        added = _added(module, x)
        return original(x, *others, **named) + (self._thinned(added, module.module_type) if module.training else added)

    def _thinned(self, added: Tensor, module_type: str) -> Tensor:
        """The three dropouts. The library's own fail, or are passed over, for some algorithms and inputs (4.1.3)."""
        settings = self._settings
        if share := settings.get("rank_dropout"):  # whole rows of D, for all samples
            axis = added.ndim - 1 if module_type == "linear" else 1
            kept = torch.rand(added.shape[axis], device=added.device) >= share
            added = added * kept.to(added.dtype).view(-1, *[1] * (added.ndim - 1 - axis))
        if share := settings.get("dropout"):
            added = nn.functional.dropout(added, share)
        if (share := settings.get("module_dropout")) and torch.rand(1).item() < share:
            added = added * 0.0  # not left out: ranks wait for the gradient of every weight
        return added


def _added(module: Any, x: Tensor) -> Tensor:
    """What the adapter adds to its layer's answer, in the format of `x`."""
    if _is_whole_weight(module):
        bias = None if module.bias is None else (module.bias * module.multiplier).to(x.dtype)
        return module.op(x, (module.weight * module.multiplier).to(x.dtype), bias, **module.kw_dict)
    if module.kw_dict.get("groups", 1) == 1:
        return module.bypass_forward_diff(x, scale=module.multiplier)
    # Beside a grouped convolution the library can only rebuild the weight (4.1.3).
    return module.op(x, (_change(module, x) * module.multiplier).to(x.dtype), None, **module.kw_dict)


def _rebuilt(module: Any, x: Tensor) -> Tensor:
    """The same where the whole weight is asked for (`dora_wd`), which is built in float32 whatever the base is.

    The library builds it in the base's format, where a small D is lost, and fails where that is not the adapter's (4.1.3).
    """
    change = _change(module, x).float()
    added = change * module.multiplier
    if module.wd:
        base = module.org_module[0].weight.detach().float()
        added = module.apply_weight_decompose(base + change, module.multiplier) - base
    return module.op(x, added.to(x.dtype), None, **module.kw_dict)


def _change(module: Any, x: Tensor) -> Tensor:
    """D itself, without the multiplier."""
    from lycoris.modules import LoConModule

    if isinstance(module, LoConModule):
        return module.make_weight(x.device) * module.scale
    return module.get_weight(module.shape) * module.scalar


def _is_whole_weight(module: Any) -> bool:
    from lycoris.modules import FullModule

    return isinstance(module, FullModule)


def _build(settings: Mapping[str, Any], denoiser: nn.Module) -> Any:
    """The library's network, nothing of it in the denoiser yet."""
    require("lycoris", option="lora_type=lycoris", extra="lycoris")
    from lycoris import LycorisNetwork

    wanted = ("multiplier", "use_tucker", "factor", "full_matrix", "decompose_both")
    given = {key: value for key, value in settings.items() if key in wanted}
    with _preset(_with_subclasses(settings["apply_preset"], denoiser)), _silent():
        return LycorisNetwork(
            denoiser,
            lora_dim=settings["linear_dim"],
            alpha=settings["linear_alpha"],
            conv_lora_dim=settings["conv_dim"],
            conv_alpha=settings["conv_alpha"],
            network_module=settings["algo"],
            weight_decompose=settings.get("dora_wd", False),
            warn_on_unmatched=False,
            **given,
        )


def _with_subclasses(preset: Mapping[str, Any], denoiser: nn.Module) -> dict[str, Any]:
    """Where `Linear` or a convolution is meant, classes made of it (quantised layers) are meant as well."""
    kinds: dict[str, set[str]] = {}
    for module in denoiser.modules():
        for kind in LAYERS:
            if isinstance(module, kind):
                kinds.setdefault(kind.__name__, set()).add(type(module).__name__)
    targets = [own for name in preset.get("target_module", ()) for own in (name, *sorted(kinds.get(name, ())))]
    layers = {
        own: layer for name, layer in preset.get("module_algo_map", {}).items() for own in (name, *sorted(kinds.get(name, ())))
    }
    return {**preset, "target_module": targets, "module_algo_map": layers}


@contextmanager
def _preset(preset: Mapping[str, Any]) -> Iterator[None]:
    """The library keeps its choice of layers on the class itself: there for the block, as it was afterwards."""
    from lycoris import LycorisNetwork

    nothing: dict[str, Any] = {
        "enable_conv": True,
        "target_module": [],
        "target_name": [],
        "module_algo_map": {},
        "name_algo_map": {},
        "use_fnmatch": False,
        "exclude_name": [],
        "lora_prefix": "lycoris",
    }
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    try:
        LycorisNetwork.apply_preset({**nothing, **preset})
        yield
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)


@contextmanager
def _silent() -> Iterator[None]:
    """The library logs to stdout; what matters of it we say ourselves."""
    log = logging.getLogger("LyCORIS")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _classes(denoiser: nn.Module) -> list[str]:
    return sorted({type(module).__name__ for module in denoiser.modules()})


def _unmatched(preset: Mapping[str, Any], denoiser: nn.Module) -> list[str]:
    """Classes and patterns of the preset that are nowhere in the denoiser."""
    classes, names = _classes(denoiser), [name for name, _ in denoiser.named_modules() if name]
    fits = fnmatch.fnmatch if preset.get("use_fnmatch") else lambda name, pattern: bool(re.match(pattern, name))
    wanted = [*preset.get("target_module", ()), *preset.get("module_algo_map", ())]
    patterns = [*preset.get("target_name", ()), *preset.get("name_algo_map", ())]
    layers = {kind.__name__ for kind in LAYERS for module in denoiser.modules() if isinstance(module, kind)}
    missing = [name for name in wanted if name not in classes and name not in layers]
    missing += [pattern for pattern in patterns if pattern not in names and not any(fits(name, pattern) for name in names)]
    return list(dict.fromkeys(missing))


def _nothing_matched(unmatched: list[str], denoiser: nn.Module) -> UserError:
    near = {name: nearest(name, _classes(denoiser)) for name in unmatched}
    hints = ", ".join(f"{name} -> {found}" for name, found in near.items() if found)
    return UserError(
        f"`lycoris_config` matches no layer of {type(denoiser).__name__}.",
        why=f"its classes are: {', '.join(_classes(denoiser))}.",
        mend=f'correct "apply_preset"{f" ({hints})" if hints else ""}, or leave it out.',
    )


def _notices(unmatched: list[str], settings: Mapping[str, Any], denoiser: nn.Module) -> Iterator[str]:
    if unmatched:
        classes = ", ".join(_classes(denoiser))
        yield f"lycoris_config names {', '.join(unmatched)}, which this denoiser does not have. Its classes: {classes}."
    if idle := wasted(settings):
        yield f"lycoris_config: {', '.join(idle)} has no effect with this algorithm."


def _leave_out(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """The base's own state holds no adapter."""
    for name in [name for name in state if name.startswith(f"{prefix}{CHILD}.")]:
        del state[name]


def _read(path: Path) -> StateDict:
    """Weights as `save_result` wrote them, from the file or its folder. Raises UserError."""
    from safetensors.torch import load_file

    file = adapter_file(path)
    weights = load_file(file)
    wrong = next((name for name in weights if not name.startswith("lycoris_")), None)
    if wrong is not None:
        raise UserError(
            f"`{file}` is no LyCORIS adapter: it holds `{wrong}`.",
            why="lora_type is lycoris, whose weights have names that begin with `lycoris_`.",
            mend='set "lora_type" to "standard" if it is a plain LoRA, or choose another file.',
        )
    return weights
