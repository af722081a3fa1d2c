"""Sana: a linear-attention transformer on the 32-fold compressed latents of DC-AE, told its prompt by Gemma 2.

What is computed equals the stock `SanaPipeline`, prompt by prompt and picture by picture.
Shape letters:  B batch,  C latent channels,  H W latent rows and columns,  L tokens,  D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner.config.options import Section, option
from simpletuner.config.run import Run
from simpletuner.data.samples import Cond, Embeds, LatentSpec, Place
from simpletuner.errors import Problem
from simpletuner.families import common
from simpletuner.families.base import Flavour, ModelFamily, OnStep, Shot, StateDict
from simpletuner.families.hollow import hollow_or_whole
from simpletuner.families.instruction import instruction_lines, lines_of_json
from simpletuner.families.repository import Repository
from simpletuner.families.sana_encoders import PROMPT_TOKENS, DeepCompressionAutoencoder, GemmaEncoder

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from simpletuner.diffusion.density import Density
    from simpletuner.diffusion.process import Process

__all__ = ["Sana", "SanaOptions"]

TOKENS_STEP = 32
"""Padded prompts have a multiple of so many tokens: few shapes, and what attention kernels are quick with."""
FP16_ONLY = "weights for fp16 or fp32 only"
NO_BF16: Mapping[str, Any] = {"mixed_precision": "no"}
DENOISER = "transformer"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("conv_inverted", "conv_point")

# Larger pictures pass through DC-AE in overlapping tiles: whole, a 4096 px picture takes tens of gigabytes.
TILE_PX = 2048


class SanaOptions(Section):
    """Sana's own options."""

    sana_complex_human_instruction: str | tuple[str, ...] | None = option(None)
    """The instruction put before each prompt (never before negative prompts and dropped captions): a list of lines, such a
    list as JSON, the path of a file with either, or "None" for no instruction. Unset: the stock pipeline's own."""


class Sana(ModelFamily):
    """Sana 1.0 and 1.5, text to image."""

    title: ClassVar[str] = "Sana"
    default_flavour: ClassVar[str] = "sana1.5-1.6b-1024"
    flavours: ClassVar[Mapping[str, Flavour]] = {
        "sana1.5-4.8b-1024": Flavour("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", 1024),
        "sana1.5-1.6b-1024": Flavour("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 1024),
        "sana1.0-1.6b-2048": Flavour("Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers", 2048),
        "sana1.0-1.6b-1024": Flavour("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", 1024),
        "sana1.0-600m-1024": Flavour("Efficient-Large-Model/Sana_600M_1024px_diffusers", 1024, FP16_ONLY, NO_BF16),
        "sana1.0-600m-512": Flavour("Efficient-Large-Model/Sana_600M_512px_diffusers", 512, FP16_ONLY, NO_BF16),
    }
    adapter_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ATTENTION,
        "self-attention": tuple(f"attn1.{name}" for name in ATTENTION),
        "cross-attention": tuple(f"attn2.{name}" for name in ATTENTION),
        "feed-forward": FEED_FORWARD,
        "full": (*ATTENTION, *FEED_FORWARD, "linear_1", "linear_2", "time_embed.linear", "patch_embed.proj", "proj_out"),
    }
    lycoris_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attn-only": ("Attention",),
        "attn-mlp": ("Attention", "GLUMBConv"),
        "full": ("Linear", "Conv2d"),
    }
    kept_whole: ClassVar[tuple[str, ...]] = ("patch_embed*", "time_embed*", "caption_*", "norm*", "*.norm*", "proj_out")
    keeps_attention: ClassVar[str] = (
        "its self-attention is linear, without a softmax; its cross-attention has heads 112 wide (72 in the 600M) and masks "
        "the padding of prompts: SageAttention is for heads of 64, 96 or 128, and neither it nor flash-attn knows masks."
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_grad_norm": 0.1,
        "flow_schedule_shift": 3.0,
        "validation_preview_steps": 5,  # each frame takes the whole DC-AE
    }
    Options: ClassVar[type[Section]] = SanaOptions

    @property
    def options(self) -> SanaOptions:
        assert isinstance(self.run.family, SanaOptions)
        return self.run.family

    @cached_property
    def repository(self) -> Repository:
        """Where the model lies, found to be a Sana."""
        model = self.run.model
        name = model.pretrained_model_name_or_path or self.flavours[model.model_flavour or self.default_flavour].repository
        repository = Repository(name, revision=model.revision, variant=model.variant)
        repository.expect("SanaPipeline", "SanaPAGPipeline", family=model.model_family)
        return repository

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        return self.repository.json(f"{DENOISER}/config.json")

    @cached_property
    def latent(self) -> LatentSpec:  # type: ignore[override]
        stages = self.repository.json("vae/config.json")["encoder_block_out_channels"]
        cell_px = 2 ** (len(stages) - 1)
        native_edge_px = self.denoiser_config["sample_size"] * cell_px
        alignment_px = common.alignment_px(native_edge_px, cell_px * self.denoiser_config["patch_size"])
        return LatentSpec(self.denoiser_config["in_channels"], cell_px, alignment_px, native_edge_px)

    @property
    def process(self) -> Process:
        from simpletuner.diffusion.process import FlowMatching

        return FlowMatching()

    def needs(self) -> list[tuple[Repository, str]]:
        return [(self.repository, name) for name in ("text_encoder", "tokenizer", "vae", DENOISER)]

    def verify(self) -> None:
        if self.run.validation.has_gallery:
            self.repository.scheduler_config()
        self.repository.verify("text_encoder", "vae", DENOISER)

    def text_encoders(self) -> tuple[GemmaEncoder]:
        lines = instruction_lines(self.options.sana_complex_human_instruction, self.run.config_path)
        lending = common.Lending.of_text(self.run, self.run.precision.text_encoder_1_precision)
        return (GemmaEncoder(self.repository, "\n".join(lines), lending),)

    def image_encoder(self) -> DeepCompressionAutoencoder:
        memory = self.run.memory
        tile_px = common.SMALL_TILE_PX if memory.vae_enable_tiling else TILE_PX
        return DeepCompressionAutoencoder(
            self.repository, tile_px, is_sliced=memory.vae_enable_slicing, is_offloaded=memory.offload_during_startup
        )

    def load_denoiser(self, *, is_hollow: bool = False) -> nn.Module:
        from diffusers import SanaTransformer2DModel

        from simpletuner.networks.checkpointing import checkpoint_blocks
        from simpletuner.networks.linear_attention import LinearAttention

        dtype = self.run.dtypes.base
        denoiser: Any = hollow_or_whole(SanaTransformer2DModel, self.repository, DENOISER, dtype, is_hollow=is_hollow)
        for block in self.blocks(denoiser):
            block.attn1.set_processor(LinearAttention())
        memory = self.run.memory
        if memory.gradient_checkpointing:
            checkpoint_blocks(denoiser, self.blocks(denoiser), memory.gradient_checkpointing_interval)
        return denoiser

    def blocks(self, denoiser: nn.Module) -> list[Any]:
        return list(denoiser.get_submodule("transformer_blocks").children())

    def density(self, latent_HW: tuple[int, int]) -> Density:
        from simpletuner.diffusion.density import flow_density

        rows, columns = latent_HW
        patch = self.denoiser_config["patch_size"]
        return flow_density(self.run.flow, (rows // patch) * (columns // patch))

    def collate(self, embeds: list[Embeds], places: list[Place]) -> Cond:
        """Pads prompts to the longest of them and on to a multiple of 32 tokens, at most 300: fewer than the stock pipeline.

        Zeros serve, and so do fewer: what the mask hides is 10,000 lower before the softmax, and then 0 in every format.
        """
        import torch
        from torch.nn.functional import pad

        prompts = [embed["prompt_LD"] for embed in embeds]
        longest = max(len(prompt_LD) for prompt_LD in prompts)
        tokens = min(PROMPT_TOKENS, math.ceil(longest / TOKENS_STEP) * TOKENS_STEP)
        if self.run.kernels.dynamo_backend != "no":
            tokens = PROMPT_TOKENS  # each length would be compiled for itself
        return {
            "prompt_BLD": torch.stack([pad(prompt_LD, (0, 0, 0, tokens - len(prompt_LD))) for prompt_LD in prompts]),
            "mask_BL": torch.stack([(torch.arange(tokens) < len(prompt_LD)).long() for prompt_LD in prompts]),
        }

    def predict(self, denoiser: Any, x_BCHW: Tensor, t_B: Tensor, cond: Cond) -> Tensor:
        import torch

        dtype = getattr(torch, self.run.dtypes.base)
        timestep_scale = denoiser.config.timestep_scale  # the files of Sana 1.0 are older than this setting and lack it
        return denoiser(
            hidden_states=x_BCHW.to(dtype),
            encoder_hidden_states=cond["prompt_BLD"].to(dtype),
            encoder_attention_mask=cond["mask_BL"],
            timestep=t_B.float() * (1000 * timestep_scale),
            return_dict=False,
        )[0]

    @contextmanager
    def sampler(self, denoiser: nn.Module, device: str) -> Iterator[Callable[[Shot, Embeds, Embeds, OnStep | None], Tensor]]:
        import torch
        from diffusers import SanaPipeline

        scheduler = common.load_scheduler(self.repository, self.run.validation.validation_flow_shift)
        pipeline: Any = SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=denoiser, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        autocast = self.run.dtypes.autocast

        def sample(shot: Shot, cond: Embeds, uncond: Embeds, on_step: OnStep | None) -> Tensor:
            def step_ended(_pipeline: Any, index: int, _timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
                if on_step is not None:
                    on_step(index + 1, state["latents"])
                return {}

            noise_1CHW = common.starting_noise(shot, self.latent)
            rows, columns = noise_1CHW.shape[-2:]
            prompts = {}
            roles = {"": cond, "negative_": uncond} if shot.guidance > 1 else {"": cond}
            batch = self.collate(list(roles.values()), [])  # together: the pipeline joins them, which takes one length
            for place, role in enumerate(roles):
                prompts[f"{role}prompt_embeds"] = batch["prompt_BLD"][place : place + 1].to(device)
                prompts[f"{role}prompt_attention_mask"] = batch["mask_BL"][place : place + 1].to(device)
            with torch.autocast(torch.device(device).type, getattr(torch, autocast)) if autocast else nullcontext():
                return pipeline(
                    **prompts,
                    negative_prompt=None,  # its default "" is refused beside ready-made embeds
                    latents=noise_1CHW.to(device),
                    # Only checked, for multiples of 32: the latents come ready-made, whatever the autoencoder's compression.
                    height=rows * 32,
                    width=columns * 32,
                    num_inference_steps=shot.steps,
                    guidance_scale=shot.guidance,
                    use_resolution_binning=False,  # else it renders at another size and scales the picture
                    output_type="latent",
                    callback_on_step_end=step_ended,
                ).images

        with common.evaluating(denoiser):
            yield sample

    @contextmanager
    def image_decoder(self, device: str) -> Iterator[Callable[[Tensor, Embeds, Embeds], Image]]:
        autoencoder = self.image_encoder()
        with common.on_loan(autoencoder.load, device) as vae:
            yield lambda latents_1CHW, _cond, _uncond: autoencoder.decode(vae(), latents_1CHW)

    @contextmanager
    def preview_decoder(self, device: str) -> Iterator[Callable[[Tensor], Image]]:
        """DC-AE itself: no small stand-in is published. It needs no more memory than the finished pictures will."""
        with self.image_decoder(device) as decode:
            yield lambda latents_1CHW: decode(latents_1CHW, {}, {})

    def save_adapter(self, weights: StateDict, lora_config: Mapping[str, Any], folder: Path) -> Path:
        return common.save_adapter(weights, lora_config, folder, prefix=DENOISER)

    def load_adapter(self, path: Path) -> StateDict:
        return common.load_adapter(path, prefixes=(DENOISER,))

    def save_denoiser(self, weights: StateDict, folder: Path) -> Path:
        return common.save_component(weights, self.denoiser_config, folder / DENOISER)

    def load_denoiser_weights(self, folder: Path) -> StateDict:
        return common.read_weights(folder / DENOISER)

    def save_pipeline(self, weights: StateDict, folder: Path) -> None:
        self.repository.copy(folder, but=DENOISER)
        self.save_denoiser(weights, folder)

    def usage(self, result: Path, prompt: str) -> str:
        edge_px = self.latent.native_edge_px
        settings = f"height={edge_px}, width={edge_px}, use_resolution_binning=False"
        if (guidance := self.run.validation.validation_guidance) is not None:  # as the gallery, so that it looks like it
            settings += f", guidance_scale={guidance:g}"
        arguments = f"{prompt!r}, {settings}"
        multiplier = common.lycoris_multiplier(self.run, self.lycoris_presets)
        return common.usage("SanaPipeline", self.repository, result, arguments, multiplier=multiplier)

    def shot_defaults(self) -> tuple[float, int]:
        return 4.5, 20  # the stock pipeline's own

    @classmethod
    def check(cls, run: Run) -> Iterable[Problem]:
        assert isinstance(run.family, SanaOptions)
        instruction = run.family.sana_complex_human_instruction
        if isinstance(instruction, str) and instruction.lstrip().startswith("["):
            try:
                lines_of_json(instruction)
            except ValueError as error:
                option_name = "sana_complex_human_instruction"
                yield Problem(
                    option_name, f"`{option_name}` begins like a list, but: {error}", mend="write a JSON list of lines."
                )
        flavour = cls.chosen(run)
        if flavour is not None and flavour.note == FP16_ONLY and run.precision.mixed_precision == "bf16":
            yield Problem(
                "mixed_precision",
                f'"mixed_precision" is "bf16", but {flavour.repository} has {FP16_ONLY}.',
                why="it was trained in fp16, and its activations lose too much in bfloat16's eight bits of precision.",
                mend='set "mixed_precision" to "fp16" or "no", or choose a 1.6B or 4.8B flavour.',
            )

    @classmethod
    def notices(cls, run: Run) -> Iterable[str]:
        yield from common.flow_notices(run)
        flavour = cls.chosen(run)
        if run.precision.mixed_precision == "fp16" and (flavour is None or flavour.note != FP16_ONLY):
            yield (
                "mixed_precision is fp16: Sana's newer weights were trained in bf16, whose range is wider. Where the card has "
                "bf16, prefer it; steps that overflow are skipped and counted."
            )

    @classmethod
    def chosen(cls, run: Run) -> Flavour | None:
        """The flavour that is trained, if it is one of ours, by name or by repository."""
        path = run.model.pretrained_model_name_or_path
        named = cls.flavours.get(run.model.model_flavour or cls.default_flavour)
        return next((flavour for flavour in cls.flavours.values() if flavour.repository == path), None) if path else named
