"""Stable Diffusion 3 and 3.5: a transformer over text and picture together, told its prompt by two CLIPs and T5.

What is computed equals the stock `StableDiffusion3Pipeline`, prompt by prompt and picture by picture.
Shape letters:  B batch,  C latent channels,  H W latent rows and columns,  L tokens,  D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from simpletuner.config.options import Section, option
from simpletuner.config.run import Run
from simpletuner.data.samples import Cond, Embeds, LatentSpec, Place
from simpletuner.errors import Problem, UserError
from simpletuner.families import common, sd3_rules
from simpletuner.families.base import Flavour, ModelFamily, OnStep, Shot, StateDict
from simpletuner.families.hollow import hollow_or_whole
from simpletuner.families.repository import Repository
from simpletuner.families.sd3_encoders import CLIP_TOKENS, Autoencoder, ClipEncoder, T5Encoder, Uncond
from simpletuner.families.sd3_previews import TAESD3, tiny_decoder
from simpletuner.families.sd3_rules import GUIDANCE, LONGEST_T5_TOKENS, STEPS
from simpletuner.families.sd3_transformer import Shape, load_single_file, verify_single_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from simpletuner.diffusion.density import Density
    from simpletuner.diffusion.process import Process

__all__ = ["SD3Options", "StableDiffusion3"]

DENOISER = "transformer"
DENOISER_CONFIG = f"{DENOISER}/config.json"
TEXT_PARTS, SUFFIXES = ("text_encoder", "tokenizer"), ("", "_2", "_3")
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
TEXT_ATTENTION = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
ENDS = ("linear", "linear_1", "linear_2", "context_embedder", "pos_embed.proj", "proj_out")


class SD3Options(Section):
    """SD3's own options."""

    pretrained_transformer_model_name_or_path: str | None = option(None, path="input")
    """A single `.safetensors` file to take the transformer from, as published (`sd3.5_medium.safetensors`) or in diffusers'
    layout; all else comes from `pretrained_model_name_or_path` or the flavour."""

    tokenizer_max_length: int = option(LONGEST_T5_TOKENS, ge=1)
    """Tokens of a prompt for T5, padded or cut to; 77 takes two fifths off the cache and cuts long prompts. More than 154 needs
    `i_know_what_i_am_doing`. CLIP always reads 77."""

    t5_padding: Literal["unmodified", "zero"] = option("unmodified")
    """`zero` clears what T5 makes of the padding, and caches only the words; stock pipelines leave it as it is."""

    sd3_clip_uncond_behaviour: Uncond = option("empty_string", also=("sd3_clip_uncond_behavior",))
    """What CLIP says where there is no text, for dropped captions and an empty negative prompt alike: the encoded empty text,
    or zeros, of tokens and pooled vector. The stock pipeline encodes it."""

    sd3_t5_uncond_behaviour: Uncond | None = option(None, also=("sd3_t5_uncond_behavior",))
    """The same for T5. Unset: as `sd3_clip_uncond_behaviour`."""

    validation_guidance_skip_layers: tuple[Annotated[int, Ge(0)], ...] | None = option(None)
    """Skip-layer guidance in the gallery, as "7,8,9" or a list: leads away, besides, from what the model would answer to the
    prompt without these blocks. Stability AI advises it for SD3.5-medium, with 7, 8 and 9, and a lower `validation_guidance`,
    of 4 or so. Training is untouched."""

    validation_guidance_skip_layers_start: float = option(0.01, ge=0, le=1, when="validation_guidance_skip_layers")
    """Share of the steps after which it begins."""

    validation_guidance_skip_layers_stop: float = option(0.2, ge=0, le=1, when="validation_guidance_skip_layers")
    """Share of the steps before which it ends; each step within costs half as much again. Fewer of them weaken it."""

    validation_guidance_skip_scale: float = option(2.8, ge=0, when="validation_guidance_skip_layers")
    """Its strength. 2.8 is meant for three layers; double it for each layer more."""

    sd3_preview_decoder_model_name_or_path: str = option(TAESD3, path="repository", when="validation_preview=true")
    """Hub repository or local folder of the tiny autoencoder that shows the gallery's pictures while they are made."""


class StableDiffusion3(ModelFamily):
    """SD3-medium, SD3.5-medium and SD3.5-large, text to image."""

    title: ClassVar[str] = "Stable Diffusion 3"
    default_flavour: ClassVar[str] = "medium"
    flavours: ClassVar[Mapping[str, Flavour]] = {
        "medium": Flavour("stabilityai/stable-diffusion-3.5-medium", 1024),
        "large": Flavour("stabilityai/stable-diffusion-3.5-large", 1024),
    }
    adapter_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ATTENTION,
        "joint-attention": (*ATTENTION, *TEXT_ATTENTION),
        "feed-forward": FEED_FORWARD,
        "full": (*ATTENTION, *TEXT_ATTENTION, *FEED_FORWARD, *ENDS),
    }
    lycoris_presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attn-only": ("Attention",),
        "attn-mlp": ("Attention", "FeedForward"),
        "full": ("Linear", "Conv2d"),
    }
    kept_whole: ClassVar[tuple[str, ...]] = (
        "pos_embed*", "time_text_embed*", "context_embedder", "norm*", "*.norm*", "proj_out"
    )  # fmt: skip
    keeps_attention: ClassVar[str] = ""
    defaults: ClassVar[Mapping[str, Any]] = {"max_grad_norm": 0.1, "flow_schedule_shift": 3.0}
    Options: ClassVar[type[Section]] = SD3Options

    @property
    def options(self) -> SD3Options:
        assert isinstance(self.run.family, SD3Options)
        return self.run.family

    @property
    def single_file(self) -> Path | None:
        """The file that the transformer comes from, if not from the repository."""
        name = self.options.pretrained_transformer_model_name_or_path
        return None if name is None else Path(name)

    @cached_property
    def repository(self) -> Repository:
        """Where the model lies, found to be an SD3."""
        model = self.run.model
        name = model.pretrained_model_name_or_path or self.flavours[model.model_flavour or self.default_flavour].repository
        repository = Repository(name, revision=model.revision, variant=model.variant)
        repository.expect("StableDiffusion3Pipeline", family=model.model_family)
        return repository

    @cached_property
    def preview_repository(self) -> Repository:
        """Where the tiny autoencoder of previews lies."""
        option = "sd3_preview_decoder_model_name_or_path"
        return Repository(self.options.sd3_preview_decoder_model_name_or_path, option=option)

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The transformer's configuration, found to be of the flavour that was asked for and deep enough."""
        config = self.repository.json(DENOISER_CONFIG)
        shape = Shape.of_config(config)
        common.verify_heads(self.run, config["attention_head_dim"], self.repository.name)
        flavour = self.run.model.model_flavour
        if flavour is not None and shape.model != f"SD3.5-{flavour}":
            raise UserError(
                f"`{self.repository.name}` holds {shape}, but model_flavour is `{flavour}`.",
                why=f"that flavour is SD3.5-{flavour}.",
                mend='leave "model_flavour" out: the path says which model it is.',
            )
        too_deep = [layer for layer in self.options.validation_guidance_skip_layers or () if layer >= shape.blocks]
        if too_deep:
            raise UserError(
                f"`validation_guidance_skip_layers` names {', '.join(map(str, too_deep))}, but `{self.repository.name}` has "
                f"{shape.blocks} blocks, 0 to {shape.blocks - 1}.",
                mend="name blocks that there are; 7, 8 and 9 are meant for SD3.5-medium.",
            )
        return config

    @cached_property
    def latent(self) -> LatentSpec:  # type: ignore[override]
        config = self.denoiser_config
        cell_px = 2 ** (len(self.repository.json("vae/config.json")["block_out_channels"]) - 1)
        patch_px = cell_px * config["patch_size"]
        native_edge_px = config["sample_size"] * cell_px
        alignment_px = common.alignment_px(native_edge_px, patch_px)
        longest_edge_px = config["pos_embed_max_size"] * patch_px
        return LatentSpec(config["in_channels"], cell_px, alignment_px, native_edge_px, longest_edge_px=longest_edge_px)

    @property
    def process(self) -> Process:
        from simpletuner.diffusion.process import FlowMatching

        return FlowMatching()

    def needs(self) -> list[tuple[Repository, str]]:
        names = [f"{part}{suffix}" for part in TEXT_PARTS for suffix in SUFFIXES]
        named = [(self.repository, name) for name in (*names, "vae", *([DENOISER] if self.single_file is None else []))]
        shows_previews = self.run.previews.validation_preview and self.run.validation.has_gallery
        return [*named, (self.preview_repository, "")] if shows_previews else named

    def verify(self) -> None:
        common.verify_attention(self.run)
        config, file = self.denoiser_config, self.single_file  # small files first: to fetch the weights may take an hour
        if file is not None:
            verify_single_file(file, config, self.repository.name)
        if self.run.validation.has_gallery:
            self.repository.scheduler_config()
        parts = [name for repository, name in self.needs() if repository is self.repository]
        self.repository.verify(*(name for name in parts if not name.startswith("tokenizer")))
        if self.run.previews.validation_preview and self.run.validation.has_gallery:
            self.preview_repository.weights("").verify()

    def text_encoders(self) -> tuple[ClipEncoder, ClipEncoder, T5Encoder]:
        options, precision = self.options, self.run.precision
        stored = (precision.text_encoder_1_precision, precision.text_encoder_2_precision, precision.text_encoder_3_precision)
        first, second, third = (common.Lending.of_text(self.run, each) for each in stored)
        clip_uncond = options.sd3_clip_uncond_behaviour
        return (
            ClipEncoder(self.repository, 1, first, clip_uncond),
            ClipEncoder(self.repository, 2, second, clip_uncond),
            T5Encoder(
                self.repository,
                third,
                tokens=options.tokenizer_max_length,
                padding=options.t5_padding,
                uncond=options.sd3_t5_uncond_behaviour or clip_uncond,
            ),
        )

    def image_encoder(self) -> Autoencoder:
        memory = self.run.memory
        return Autoencoder(
            self.repository,
            tile_px=common.SMALL_TILE_PX if memory.vae_enable_tiling else None,
            is_sliced=memory.vae_enable_slicing,
            is_offloaded=memory.offload_during_startup,
        )

    def load_denoiser(self, *, is_hollow: bool = False) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        from simpletuner.networks.checkpointing import checkpoint_blocks

        dtype = self.run.dtypes.base
        if self.single_file is None or is_hollow:
            denoiser = hollow_or_whole(SD3Transformer2DModel, self.repository, DENOISER, dtype, is_hollow=is_hollow)
        else:
            denoiser = load_single_file(self.single_file, self.repository.file(DENOISER_CONFIG), dtype)
        if (memory := self.run.memory).gradient_checkpointing:
            checkpoint_blocks(denoiser, self.blocks(denoiser), memory.gradient_checkpointing_interval)
        return denoiser

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return list(denoiser.get_submodule("transformer_blocks").children())

    def density(self, latent_HW: tuple[int, int]) -> Density:
        from simpletuner.diffusion.density import flow_density

        rows, columns = latent_HW
        patch = self.denoiser_config["patch_size"]
        return flow_density(self.run.flow, (rows // patch) * (columns // patch))

    def collate(self, embeds: list[Embeds], places: list[Place]) -> Cond:
        """[CLIP | T5] as one sequence, with the zeros that were not cached: CLIP's missing width, and rows at an end."""
        import torch
        from torch.nn.functional import pad

        def rows(name: str, length: int) -> Tensor:
            return torch.stack([pad(embed[name], (0, 0, 0, length - len(embed[name]))) for embed in embeds])

        t5_BLD = rows("t5_LD", self.options.tokenizer_max_length)
        clip_BLD = torch.cat([rows("clip_1_LD", CLIP_TOKENS), rows("clip_2_LD", CLIP_TOKENS)], dim=-1)
        clip_BLD = pad(clip_BLD, (0, t5_BLD.shape[-1] - clip_BLD.shape[-1]))
        return {
            "prompt_BLD": torch.cat([clip_BLD, t5_BLD], dim=-2),
            "pooled_BD": torch.stack([torch.cat([embed["pooled_1_D"], embed["pooled_2_D"]]) for embed in embeds]),
        }

    def predict(self, denoiser: Any, x_BCHW: Tensor, t_B: Tensor, cond: Cond) -> Tensor:
        import torch

        dtype = getattr(torch, self.run.dtypes.base)
        return denoiser(
            hidden_states=x_BCHW.to(dtype),
            encoder_hidden_states=cond["prompt_BLD"].to(dtype),
            pooled_projections=cond["pooled_BD"].to(dtype),
            timestep=t_B.float() * 1000,
            return_dict=False,
        )[0]

    @contextmanager
    def sampler(self, denoiser: nn.Module, device: str) -> Iterator[Callable[[Shot, Embeds, Embeds, OnStep | None], Tensor]]:
        import torch

        from simpletuner.networks.joint_attention import attending
        from simpletuner.networks.libraries import IMAGE_PROCESSORS, without

        with without(IMAGE_PROCESSORS):
            from diffusers import StableDiffusion3Pipeline

        absent: dict[str, Any] = {f"{part}{suffix}": None for part in TEXT_PARTS for suffix in SUFFIXES}
        scheduler = common.load_scheduler(self.repository, self.run.validation.validation_flow_shift)
        pipeline: Any = StableDiffusion3Pipeline(transformer=denoiser, scheduler=scheduler, vae=None, **absent)  # type: ignore[arg-type]
        pipeline.set_progress_bar_config(disable=True)
        dtype, autocast = getattr(torch, self.run.dtypes.base), self.run.dtypes.autocast

        def sample(shot: Shot, cond: Embeds, uncond: Embeds, on_step: OnStep | None) -> Tensor:
            def step_ended(_pipeline: Any, index: int, _timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
                if on_step is not None:
                    on_step(index + 1, state["latents"])
                return {}

            noise_1CHW = common.starting_noise(shot, self.latent)
            rows, columns = noise_1CHW.shape[-2:]
            prompts = {}
            roles = {"": cond, "negative_": uncond} if shot.guidance > 1 else {"": cond}
            for role, embeds in roles.items():
                batch = self.collate([embeds], [])
                prompts[f"{role}prompt_embeds"] = batch["prompt_BLD"].to(device, dtype)
                prompts[f"{role}pooled_prompt_embeds"] = batch["pooled_BD"].to(device, dtype)
            with torch.autocast(torch.device(device).type, getattr(torch, autocast)) if autocast else nullcontext():
                latents_1CHW = pipeline(
                    **prompts,
                    **self.shot_settings(),
                    latents=noise_1CHW.to(device),
                    # Only checked, for whole patches of 8 px cells: the latents come ready-made, whatever the autoencoder.
                    height=rows * 8,
                    width=columns * 8,
                    num_inference_steps=shot.steps,
                    guidance_scale=shot.guidance,
                    output_type="latent",
                    callback_on_step_end=step_ended,
                ).images
            return latents_1CHW.float()

        with common.evaluating(denoiser), attending(denoiser, self.run.kernels.attention_mechanism):
            yield sample

    def shot_settings(self) -> dict[str, Any]:
        """Skip-layer guidance as the stock pipeline takes it; nothing where it is off."""
        options = self.options
        if not options.validation_guidance_skip_layers:
            return {}
        return {
            "skip_guidance_layers": list(options.validation_guidance_skip_layers),
            "skip_layer_guidance_scale": options.validation_guidance_skip_scale,
            "skip_layer_guidance_start": options.validation_guidance_skip_layers_start,
            "skip_layer_guidance_stop": options.validation_guidance_skip_layers_stop,
        }

    @contextmanager
    def image_decoder(self, device: str) -> Iterator[Callable[[Tensor, Embeds, Embeds], Image]]:
        autoencoder = self.image_encoder()
        with common.on_loan(autoencoder.load, device) as vae:
            yield lambda latents_1CHW, _cond, _uncond: autoencoder.decode(vae(), latents_1CHW)

    @contextmanager
    def preview_decoder(self, device: str) -> Iterator[Callable[[Tensor], Image]]:
        with tiny_decoder(self.preview_repository.weights(""), device) as decode:
            yield decode

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
        edge_px, validation = self.latent.native_edge_px, self.run.validation
        guidance = validation.validation_guidance
        settings = {
            "height": edge_px,
            "width": edge_px,
            "guidance_scale": GUIDANCE if guidance is None else guidance,  # as the gallery, so that it looks like it
            "num_inference_steps": validation.validation_num_inference_steps or STEPS,
            "max_sequence_length": self.options.tokenizer_max_length,  # the pipeline's own is longer than what was trained
            **self.shot_settings(),
        }
        arguments = ", ".join([repr(prompt), *(f"{name}={value!r}" for name, value in settings.items())])
        transformer = ""
        if self.single_file is not None:
            base = f"config={self.repository.name!r}, subfolder={DENOISER!r}"
            transformer = f"SD3Transformer2DModel.from_single_file({str(self.single_file)!r}, {base})"
        multiplier = common.lycoris_multiplier(self.run, self.lycoris_presets)
        return common.usage(
            "StableDiffusion3Pipeline", self.repository, result, arguments, transformer=transformer, multiplier=multiplier
        )

    def shot_defaults(self) -> tuple[float, int]:
        return GUIDANCE, STEPS  # the page's guidance; the stock pipeline's steps

    @classmethod
    def check(cls, run: Run) -> Iterable[Problem]:
        assert isinstance(run.family, SD3Options)
        return sd3_rules.problems(run, run.family)

    @classmethod
    def notices(cls, run: Run) -> Iterable[str]:
        assert isinstance(run.family, SD3Options)
        yield from common.flow_notices(run)
        yield from sd3_rules.notices(run, run.family)
