"""Stable Cascade's Stage C: a prior over the 42-fold compressed latents of an EfficientNet, told its prompt by CLIP-G.

Stage C is what is trained; Stages B and A only turn its latents into the gallery's pictures.
Shape letters:  B batch,  C latent channels,  H W latent rows and columns,  L tokens,  D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.config.options import Section
from simpletuner.config.run import Run
from simpletuner.data.samples import Cond, Embeds, LatentSpec, Place
from simpletuner.errors import Problem, UserError
from simpletuner.families import cascade_parts as parts
from simpletuner.families import cascade_pictures as pictures
from simpletuner.families import cascade_rules, common
from simpletuner.families.base import Flavour, ModelFamily, OnStep, Shot, StateDict
from simpletuner.families.cascade_images import ClipImageEncoder
from simpletuner.families.cascade_lora import PREFIX, PREFIXES, PRESETS, load_stage_c_lora
from simpletuner.families.cascade_options import StableCascadeOptions
from simpletuner.families.cascade_pictures import load_decoder_pipeline
from simpletuner.families.hollow import hollow_or_whole
from simpletuner.families.repository import Component, Repository

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from simpletuner.diffusion.density import Density
    from simpletuner.diffusion.process import CosineEpsilon
    from simpletuner.diffusion.weighting import AdaptiveWeights

__all__ = ["StableCascade", "StableCascadeOptions", "load_decoder_pipeline", "load_stage_c_lora"]

REPOSITORY = "stabilityai/stable-cascade-prior"
ALIGNMENT_PX = 128  # three cells; other edges have no whole grid, and Stage B fails on some of them
SUBFOLDERS = {"stage-c": "prior", "stage-c-lite": "prior_lite"}
FORMATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class StableCascade(ModelFamily):
    """Stage C of Stable Cascade, 3.6 B parameters, and its lite kin of 1.0 B."""

    title: ClassVar[str] = "Stable Cascade"
    default_flavour: ClassVar[str] = "stage-c"
    flavours: ClassVar[Mapping[str, Flavour]] = {name: Flavour(REPOSITORY, 1024) for name in SUBFOLDERS}
    adapter_presets: ClassVar[Mapping[str, tuple[str, ...]]] = PRESETS
    lycoris_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attn-only": ("Attention",),
        "attn-mlp": ("Attention", "Sequential"),
        "full": ("Attention", "Sequential", "SDCascadeTimestepBlock"),
    }
    kept_whole: ClassVar[tuple[str, ...]] = ("embedding*", "clip_*", "*.mapper*", "clf*")
    keeps_float32: ClassVar[bool] = True
    has_tiles: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {
        "mixed_precision": "no",
        "base_model_default_dtype": "fp32",
        "optimizer": "torch-adamw",
        "max_grad_norm": 1.0,
        "vae_batch_size": 1,
    }
    Options: ClassVar[type[Section]] = StableCascadeOptions

    @property
    def options(self) -> StableCascadeOptions:
        assert isinstance(self.run.family, StableCascadeOptions)
        return self.run.family

    @cached_property
    def repository(self) -> Repository:
        """Where Stage C lies, found to be one."""
        model = self.run.model
        repository = Repository(
            model.pretrained_model_name_or_path or REPOSITORY, revision=model.revision, variant=model.variant
        )
        repository.expect("StableCascadePriorPipeline", family=model.model_family)
        return repository

    @cached_property
    def decoder_repository(self) -> Repository:
        """Where Stages B and A and the loose files lie."""
        options = self.options
        return Repository(
            options.stable_cascade_decoder_model_name_or_path,
            variant=options.stable_cascade_decoder_variant,
            option="stable_cascade_decoder_model_name_or_path",
        )

    @property
    def subfolder(self) -> str:
        """Of the prior, in its repository: one repository holds both flavours."""
        return SUBFOLDERS[self.run.model.model_flavour or self.default_flavour]

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        return self.repository.json(f"{self.subfolder}/config.json")

    @cached_property
    def latent(self) -> LatentSpec:  # type: ignore[override]
        channels = self.denoiser_config["in_channels"]
        return LatentSpec(channels, parts.CELL_PX, ALIGNMENT_PX, native_edge_px=1024, longest_aspect=2)

    @cached_property
    def process(self) -> CosineEpsilon:  # type: ignore[override]
        from simpletuner.diffusion.process import CosineEpsilon

        return CosineEpsilon(shift=self.options.stable_cascade_schedule_shift)

    def needs(self) -> list[tuple[Repository, str]]:
        named = [(self.repository, name) for name in ("text_encoder", "tokenizer", self.subfolder)]
        if self.options.stable_cascade_effnet_encoder is None:
            named.append((self.decoder_repository, parts.ENCODER_FILE))
        if self.options.stable_cascade_image_embed_probability:
            named += [(self.repository, name) for name in ("image_encoder", "feature_extractor")]
        if not self.run.validation.has_gallery:
            return named
        uses_decoder = self.options.stable_cascade_use_decoder_for_validation
        if self.run.previews.validation_preview or not uses_decoder:
            named.append((self.decoder_repository, parts.PREVIEWER_FILE))
        if not uses_decoder:
            return named
        stages = (self.options.stable_cascade_decoder_subfolder, "vqgan")
        return [*named, *((self.decoder_repository, name) for name in stages)]

    def verify(self) -> None:
        if self.subfolder != PREFIX and self.repository.find(f"{self.subfolder}/config.json") is None:
            raise UserError(
                f"`{self.repository.name}` has no `{self.subfolder}`, where {self.run.model.model_flavour} would lie.",
                why=f"a pipeline of your own, such as a full fine-tune, keeps its one prior in `{PREFIX}`, of either flavour.",
                mend='leave "model_flavour" out to train that one.',
            )
        self.repository.verify("text_encoder", self.subfolder)
        self.image_encoder().verify()
        if self.options.stable_cascade_image_embed_probability:
            self.repository.verify("image_encoder")
            self.repository.component("feature_extractor")
        if not self.run.validation.has_gallery:
            return
        self.repository.scheduler_config()
        has_decoder = self.options.stable_cascade_use_decoder_for_validation
        if self.run.previews.validation_preview or not has_decoder:
            parts.verify_previewer(self.loose_file(parts.PREVIEWER_FILE))
        if has_decoder:
            pictures.verify_decoder(self.decoder_repository, self.options.stable_cascade_decoder_subfolder)

    def text_encoders(self) -> tuple[parts.ClipEncoder]:
        lending = common.Lending.of_text(self.run, self.run.precision.text_encoder_1_precision)
        return (parts.ClipEncoder(self.repository, lending),)

    def image_encoder(self) -> parts.SemanticCompressor:
        memory, repositories = self.run.memory, (self.decoder_repository, self.repository)
        return parts.SemanticCompressor(
            self.options.stable_cascade_effnet_encoder,
            repositories,
            is_sliced=memory.vae_enable_slicing,
            is_offloaded=memory.offload_during_startup,
        )

    def image_prompts(self) -> tuple[ClipImageEncoder, float] | None:
        share = self.options.stable_cascade_image_embed_probability
        return (ClipImageEncoder(self.repository, self.run.memory.offload_during_startup), share) if share else None

    def loose_file(self, name: str) -> Path:
        """A network of the release that comes as one file."""
        return parts.loose_file(name, [self.decoder_repository, self.repository])

    @cached_property
    def decoder(self) -> Component:
        """Stage B. Raises UserError."""
        return pictures.stage_b(self.decoder_repository, self.options.stable_cascade_decoder_subfolder)

    @cached_property
    def vqgan(self) -> Component:
        """Stage A. Raises UserError."""
        return pictures.stage_a(self.decoder_repository)

    def load_denoiser(self, *, is_hollow: bool = False) -> nn.Module:
        from diffusers.models import StableCascadeUNet

        from simpletuner.networks.checkpointing import checkpoint_blocks

        dtype = self.run.dtypes.base
        denoiser = hollow_or_whole(StableCascadeUNet, self.repository, self.subfolder, dtype, is_hollow=is_hollow)
        pictures.exact_time(denoiser)
        memory = self.run.memory
        if memory.gradient_checkpointing:
            checkpoint_blocks(denoiser, self.blocks(denoiser), memory.gradient_checkpointing_interval)
        return denoiser

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        levels = [*denoiser.get_submodule("down_blocks").children(), *denoiser.get_submodule("up_blocks").children()]
        return [block for level in levels for block in level.children()]

    def density(self, latent_HW: tuple[int, int]) -> Density:
        from simpletuner.diffusion.density import floored

        return floored(0.001)

    def weight(self, t_B: Tensor) -> Tensor:
        return self.process.weight(t_B) if self.options.stable_cascade_loss_weighting == "p2" else super().weight(t_B)

    def adaptive_weights(self, device: str) -> AdaptiveWeights | None:
        from simpletuner.diffusion.weighting import AdaptiveWeights

        is_adaptive = self.options.stable_cascade_loss_weighting == "adaptive"
        return AdaptiveWeights(self.process.log_snr, device) if is_adaptive else None

    def collate(self, embeds: list[Embeds], places: list[Place]) -> Cond:
        """`image` is zeros, as the sampler's, unless a picture was given: without any the network would silently not hear the
        text (diffusers 0.42)."""
        import torch

        pooled_BD = torch.stack([embed["pooled_D"] for embed in embeds])
        zeros_D = pooled_BD.new_zeros(self.denoiser_config["clip_image_in_channels"])
        return {
            "text_BLD": torch.stack([embed["text_LD"] for embed in embeds]),
            "pooled_B1D": pooled_BD[:, None],
            "image_B1D": torch.stack([embed.get("image_D", zeros_D).to(zeros_D) for embed in embeds])[:, None],
        }

    def predict(self, denoiser: Any, x_BCHW: Tensor, t_B: Tensor, cond: Cond) -> Tensor:
        import torch

        dtype = getattr(torch, self.run.dtypes.base)
        return denoiser(
            sample=x_BCHW.to(dtype),
            timestep_ratio=self.process.ratio(t_B),
            clip_text_pooled=cond["pooled_B1D"].to(dtype),
            clip_text=cond["text_BLD"].to(dtype),
            clip_img=cond["image_B1D"].to(dtype),
            return_dict=False,
        )[0]

    @contextmanager
    def sampler(self, denoiser: nn.Module, device: str) -> Iterator[Callable[[Shot, Embeds, Embeds, OnStep | None], Tensor]]:
        import torch

        dtypes = self.run.dtypes
        pipeline = pictures.prior_pipeline(denoiser, dtypes.base, common.load_scheduler(self.repository, None))

        def sample(shot: Shot, cond: Embeds, uncond: Embeds, on_step: OnStep | None) -> Tensor:
            def step_ended(_pipeline: Any, index: int, _timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
                if on_step is not None:
                    on_step(index + 1, state["latents"])
                return {}

            prompts = {}
            roles = {"": cond, "negative_": uncond} if shot.guidance > 1 else {"": cond}  # it refuses idle negatives
            for role, embeds in roles.items():
                batch = self.collate([embeds], [])
                prompts[f"{role}prompt_embeds"] = batch["text_BLD"].to(device)
                prompts[f"{role}prompt_embeds_pooled"] = batch["pooled_B1D"].to(device)
            autocast = dtypes.autocast
            with torch.autocast(torch.device(device).type, getattr(torch, autocast)) if autocast else nullcontext():
                return pipeline(
                    **prompts,
                    height=shot.height_px,
                    width=shot.width_px,
                    num_inference_steps=self.options.stable_cascade_validation_prior_num_inference_steps,
                    guidance_scale=shot.guidance,
                    generator=torch.Generator("cpu").manual_seed(shot.seed),  # the sampler draws noise at every step
                    callback_on_step_end=step_ended,
                ).image_embeddings

        with common.evaluating(denoiser):
            yield sample

    @contextmanager
    def image_decoder(self, device: str) -> Iterator[Callable[[Tensor, Embeds, Embeds], Image]]:
        if not self.options.stable_cascade_use_decoder_for_validation:
            with self.preview_decoder(device) as preview:
                yield lambda latents_1CHW, _cond, _uncond: preview(latents_1CHW)
            return
        load = partial(pictures.load_decoder, self.decoder, self.vqgan, self._decoder_dtype)
        with common.on_loan(load, device) as decoder:
            yield lambda latents_1CHW, cond, uncond: self._decode(decoder(), latents_1CHW, cond, uncond)

    @contextmanager
    def preview_decoder(self, device: str) -> Iterator[Callable[[Tensor], Image]]:
        with common.on_loan(lambda: parts.load_previewer(self.loose_file(parts.PREVIEWER_FILE)), device) as previewer:
            yield lambda latents_1CHW: pictures.preview(previewer(), latents_1CHW, parts.size_of(latents_1CHW))

    def sampler_steps(self, shot: Shot) -> int:
        return self.options.stable_cascade_validation_prior_num_inference_steps

    @property
    def _decoder_dtype(self) -> str:
        default = "bf16" if self.run.hardware.has_bf16 else "fp32"
        return FORMATS[self.options.stable_cascade_decoder_dtype or default]

    def _decode(self, decoder: Any, latents_1CHW: Tensor, cond: Embeds, uncond: Embeds) -> Image:
        validation = self.run.validation
        return pictures.decode(
            pictures.decoder_pipeline(decoder, self._decoder_dtype, common.load_scheduler(self.decoder_repository, None)),
            latents_1CHW,
            {"prompt": cond["pooled_D"][None, None].float(), "negative": uncond["pooled_D"][None, None].float()},
            guidance=self.options.stable_cascade_validation_decoder_guidance_scale,
            steps=validation.validation_num_inference_steps or self.shot_defaults()[1],
            seed=self.run.training.seed if validation.validation_seed is None else validation.validation_seed,
        )

    def save_adapter(self, weights: StateDict, lora_config: Mapping[str, Any], folder: Path) -> Path:
        return common.save_adapter(weights, lora_config, folder, prefix=PREFIX)

    def load_adapter(self, path: Path) -> StateDict:
        return common.load_adapter(path, prefixes=PREFIXES)

    def save_denoiser(self, weights: StateDict, folder: Path) -> Path:
        return common.save_component(weights, self.denoiser_config, folder / PREFIX)

    def load_denoiser_weights(self, folder: Path) -> StateDict:
        return common.read_weights(folder / PREFIX)

    def save_pipeline(self, weights: StateDict, folder: Path) -> None:
        self.repository.copy(folder, but=PREFIX)
        self.save_denoiser(weights, folder)

    def usage(self, result: Path, prompt: str) -> str:
        edge_px = self.latent.native_edge_px
        arguments = f"{prompt!r}, height={edge_px}, width={edge_px}"
        guidance = self.shot_guidance()
        if guidance is None:
            guidance = self.run.validation.validation_guidance
        if guidance is not None:  # as the gallery, so that it looks like it
            arguments += f", guidance_scale={guidance:g}"
        multiplier = common.lycoris_multiplier(self.run, self.lycoris_presets)
        variant = self.decoder_repository.variant
        decoder = f"{self.decoder_repository.name!r}, {self.options.stable_cascade_decoder_subfolder!r}"
        decoder += f", {variant!r}" if variant else ""
        return pictures.usage(self.repository, self.subfolder, decoder, result, arguments, multiplier)

    def shot_defaults(self) -> tuple[float, int]:
        return 4.0, 10  # the stock pipelines' own: the prior's guidance, the decoder's steps

    def shot_guidance(self) -> float | None:
        return self.options.stable_cascade_validation_prior_guidance_scale

    def shot_settings(self) -> dict[str, Any]:
        options = self.options
        steps = {"prior_inference_steps": options.stable_cascade_validation_prior_num_inference_steps}
        if not options.stable_cascade_use_decoder_for_validation:
            return {**steps, "decoder": "previewer"}
        decoder = {"decoder": options.stable_cascade_decoder_subfolder, "decoder_dtype": self._decoder_dtype}
        return {**steps, **decoder, "decoder_guidance": options.stable_cascade_validation_decoder_guidance_scale}

    @classmethod
    def check(cls, run: Run) -> Iterable[Problem]:
        return cascade_rules.problems(run)

    @classmethod
    def notices(cls, run: Run) -> Iterable[str]:
        assert isinstance(run.family, StableCascadeOptions)
        return cascade_rules.notices(run, run.family)
