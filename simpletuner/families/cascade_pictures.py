"""Stable Cascade's stock pipelines round our networks: Stage C for latents, Stage B and A for pictures.

Everything that diffusers calls deprecated in them is kept in this file.
Shape letters:  B batch,  C latent channels,  H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.errors import UserError
from simpletuner.families import common
from simpletuner.families.repository import Component, Repository
from simpletuner.networks.libraries import IMAGE_PROCESSORS, without

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

__all__ = [
    "decode",
    "decoder_pipeline",
    "exact_time",
    "load_decoder",
    "load_decoder_pipeline",
    "preview",
    "prior_pipeline",
    "stage_a",
    "stage_b",
    "undisturbed",
    "usage",
    "verify_decoder",
]

DEPRECATED = {
    "diffusers.pipelines.pipeline_utils": "has been deprecated and will not receive bug fixes",
    **IMAGE_PROCESSORS,
}
"""What these pipelines make the libraries say (diffusers 0.42), by the logger that says it."""

STAGE_B = ("decoder", "decoder_lite")
"""Where the real repositories keep it."""


def prior_pipeline(denoiser: nn.Module, dtype: str, scheduler: Any) -> Any:
    """The stock Stage C pipeline round the live denoiser, whose weights are `dtype`."""
    with undisturbed():
        from diffusers import StableCascadePriorPipeline

        pipeline: Any = StableCascadePriorPipeline(
            tokenizer=None, text_encoder=TextFormat(), prior=shell(denoiser, dtype), scheduler=scheduler
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_decoder(decoder: Component, vqgan: Component, dtype: str) -> nn.Module:
    """Stage B in `dtype` and Stage A in float32, as `decoder` and `vqgan` of one module. Raises UserError."""
    from diffusers.models import StableCascadeUNet
    from torch import nn

    with undisturbed():
        from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    stage_b = exact_time(common.load_whole(StableCascadeUNet, decoder, dtype))
    return nn.ModuleDict({"decoder": stage_b, "vqgan": common.load_whole(PaellaVQModel, vqgan, "float32")})


def decoder_pipeline(decoder: Any, dtype: str, scheduler: Any) -> Any:
    """The stock pipeline of Stages B and A round `load_decoder`'s module: `from_pretrained` finds no PaellaVQModel."""
    with undisturbed():
        from diffusers import StableCascadeDecoderPipeline

        pipeline: Any = StableCascadeDecoderPipeline(
            tokenizer=None,
            text_encoder=None,
            decoder=shell(decoder["decoder"], dtype),
            vqgan=decoder["vqgan"],
            scheduler=scheduler,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def decode(
    pipeline: Any, latents_1CHW: Tensor, pooled: Mapping[str, Tensor], *, guidance: float, steps: int, seed: int
) -> Image:
    """A picture of Stage C latents. `pooled` holds (1, 1, D) of "prompt" and "negative", which only a guidance above 1 asks."""
    import torch

    [picture] = pipeline(
        image_embeddings=latents_1CHW.to(pipeline.device, torch.float32),
        prompt_embeds=pooled["prompt"],  # only counted: Stage B hears the pooled embeds alone
        prompt_embeds_pooled=pooled["prompt"].to(pipeline.device),
        negative_prompt_embeds_pooled=pooled["negative"].to(pipeline.device),
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
    ).images
    return picture


def preview(previewer: nn.Module, latents_1CHW: Tensor, size_WH: tuple[int, int]) -> Image:
    """A picture of Stage C latents by the small network, enlarged to the size that it stands for."""
    import torch
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    with torch.no_grad():
        latents_1CHW = latents_1CHW.to(next(previewer.parameters()).device, torch.float32)
        pixels_13HW = previewer(latents_1CHW).clamp(0, 1)
    [picture] = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels_13HW))
    return picture.resize(size_WH, Image.Resampling.BICUBIC)


def stage_b(repository: Repository, subfolder: str) -> Component:
    """Stage B's weights: of the repository's sub-folder, or of a folder that holds one. Raises UserError."""
    own = Path(subfolder).expanduser().absolute()
    # The usual names mean the repository's, whatever lies where one happens to stand.
    if subfolder not in STAGE_B and (own / "config.json").is_file():
        return Repository(str(own.parent), variant=repository.variant).weights(own.name)
    return repository.weights(subfolder)


def stage_a(repository: Repository) -> Component:
    """Stage A's weights; few repositories have it in another variant than the plain one. Raises UserError."""
    component = repository.component("vqgan")
    return component if component.weights else repository.weights("vqgan")


def verify_decoder(repository: Repository, subfolder: str) -> None:
    """Raises UserError unless everything that `load_decoder` and its pipeline read is here, and whole by its headers."""
    try:
        stage_b(repository, subfolder).verify()
        stage_a(repository).verify()
        repository.scheduler_config()
    except UserError as error:
        raise UserError(
            f"The gallery's decoder is not here: {error.problem.what}",
            why="; ".join(filter(None, ["Stage C alone makes no pictures, Stages B and A do", error.problem.why])),
            mend="fetch it, name another with `stable_cascade_decoder_model_name_or_path`, `_subfolder` and `_variant`, or set "
            '"stable_cascade_use_decoder_for_validation" to false for small pictures by the Previewer network.',
        ) from error


def load_decoder_pipeline(name: str, subfolder: str = "decoder", variant: str | None = None) -> Any:
    """The stock StableCascadeDecoderPipeline of a hub repository or folder, in float32 on the CPU.

    `subfolder` may be the path of a folder that holds a Stage B of your own.
    It has no text encoder: hand it `prompt_embeds` and `prompt_embeds_pooled` as the prior's pipeline returns them.
    """
    repository = Repository(name, variant=variant)
    decoder = load_decoder(stage_b(repository, subfolder), stage_a(repository), "float32")
    return decoder_pipeline(decoder, "float32", common.load_scheduler(repository, None))


def usage(
    prior: Repository, subfolder: str, decoder: str, result: Path, arguments: str, lycoris_multiplier: float | None
) -> str:
    """A few lines of Python that make a picture with `result`, a LoRA's file or a whole prior's folder.

    `decoder` are the arguments of `load_decoder_pipeline`, `arguments` those of the prior's pipeline. A LyCORIS adapter comes
    with its multiplier.
    """
    is_adapter = result.suffix == ".safetensors"
    base = prior.arguments if is_adapter else repr(str(result))
    lines = [
        "from diffusers import StableCascadePriorPipeline",
        "from simpletuner.families.stable_cascade import load_decoder_pipeline, load_stage_c_lora",
    ]
    if is_adapter and subfolder != "prior":
        lines.append("from diffusers.models import StableCascadeUNet")
        lines.append(f"lite = StableCascadeUNet.from_pretrained({base}, subfolder={subfolder!r})")
        base += ", prior=lite"
    lines.append(f"prior = StableCascadePriorPipeline.from_pretrained({base})")
    if lycoris_multiplier is not None:
        lines.append("from lycoris import create_lycoris_from_weights")
        lines.append(f"network, _ = create_lycoris_from_weights({lycoris_multiplier:g}, {str(result)!r}, prior.prior)")
        lines.append("network.apply_to()")
    elif is_adapter:
        lines.append(f"load_stage_c_lora(prior, {str(result)!r})")
    lines += [
        f"decoder = load_decoder_pipeline({decoder})",
        f"latents, embeds, pooled, *_ = prior({arguments}, return_dict=False)",
        "decoder(latents, prompt_embeds=embeds, prompt_embeds_pooled=pooled).images[0].save('picture.png')",
    ]
    return "\n".join(lines)


def exact_time(network: nn.Module) -> nn.Module:
    """Lets half-precision weights take a float32 ratio: the finished embedding is cast, never the ratio.

    The embedding multiplies the ratio by 10,000, where bfloat16 is off by up to 20 of a sine's phase. Unlike other models'
    time embeddings this one keeps the ratio's format and its layers then refuse it (diffusers 0.42).
    """
    from diffusers.models.unets.unet_stable_cascade import SDCascadeTimestepBlock

    for block in network.modules():
        if isinstance(block, SDCascadeTimestepBlock):
            block.register_forward_pre_hook(_embedding_as_hidden)
    return network


def _embedding_as_hidden(_block: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    hidden_BCHW, embedding_BD = inputs
    return hidden_BCHW, embedding_BD.to(hidden_BCHW.dtype)


class TextFormat:
    """What the prior's pipeline asks of a text encoder where embeds are ready-made: their format."""

    @property
    def dtype(self) -> Any:
        import torch

        return torch.float32


def shell(network: nn.Module, dtype: str) -> nn.Module:
    """Keeps a stock pipeline from rounding latents and ratio to the format of the network's first weight."""
    import torch

    from simpletuner.networks.shell import Float32Shell

    return Float32Shell(network, getattr(torch, dtype), exact=("timestep_ratio",))


def undisturbed() -> AbstractContextManager[None]:
    """Keeps these libraries from saying what is known and no user can change; anything else is heard."""
    return without(DEPRECATED)
