"""Memory estimates of the published models, from their configurations alone: no weight is needed, and none is made.

Activations of a LoRA step of rank 16 at 1024 px and batch 1 in bfloat16, with and without recomputation; bytes of encoders and
what they take at work; and how long the whole estimate takes, of which `simpletuner check` may need a part of 30 s.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Figure, arguments, made_run, scratch, tell

from simpletuner.config.run import Dtypes, Hardware
from simpletuner.estimates import GIB, Largest, Memory, Workload, memory_of

SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
}  # fmt: skip
SANA = {
    "in_channels": 32, "out_channels": 32, "attention_head_dim": 32, "caption_channels": 2304, "mlp_ratio": 2.5,
    "sample_size": 32, "patch_size": 1,
}  # fmt: skip
STAGE_C = {
    "in_channels": 16, "out_channels": 16, "patch_size": 1, "clip_text_in_channels": 1280, "clip_seq": 4,
    "clip_text_pooled_in_channels": 1280, "clip_image_in_channels": 768, "switch_level": [False],
    "timestep_conditioning_type": ["sca", "crp"], "timestep_ratio_embedding_dim": 64,
}  # fmt: skip
WIDE = {"num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240}
DENOISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD3.5-medium": ("sd3", SD3 | {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
    }),
    "SD3.5-large": ("sd3", SD3 | {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "dual_attention_layers": [],
    }),
    "Sana 0.6B": ("sana", SANA | {
        "num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    }),
    "Sana 1.6B": ("sana", SANA | WIDE | {"num_layers": 20, "num_attention_heads": 70}),
    "Sana 4.8B": ("sana", SANA | WIDE | {"num_layers": 60, "num_attention_heads": 70, "qk_norm": "rms_norm_across_heads"}),
    "Stage C lite": ("stable_cascade", STAGE_C | {
        "conditioning_dim": 1536, "block_out_channels": [1536, 1536], "num_attention_heads": [24, 24],
        "down_num_layers_per_block": [4, 12], "up_num_layers_per_block": [12, 4],
    }),
    "Stage C": ("stable_cascade", STAGE_C | {
        "conditioning_dim": 2048, "block_out_channels": [2048, 2048], "num_attention_heads": [32, 32],
        "down_num_layers_per_block": [8, 24], "up_num_layers_per_block": [24, 8],
    }),
}  # fmt: skip
CLIP_L = {
    "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
CLIP_G = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280
}  # fmt: skip
T5_XXL = {
    "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False,
}  # fmt: skip
GEMMA_2B = {
    "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
}  # fmt: skip
KL = {
    "latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "use_quant_conv": False,
    "use_post_quant_conv": False, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024,
}  # fmt: skip
STAGES = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
DC_AE = {
    "latent_channels": 32, "attention_head_dim": 32, "encoder_block_types": STAGES, "decoder_block_types": STAGES,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024], "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024], "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407,
}  # fmt: skip
REPOSITORIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd3": (
        "StableDiffusion3Pipeline", "transformer",
        {"vae": KL, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    ),
    "sana": ("SanaPipeline", "transformer", {"vae": DC_AE, "text_encoder": GEMMA_2B}),
    "stable_cascade": ("StableCascadePriorPipeline", "prior", {"text_encoder": CLIP_G}),
}  # fmt: skip
"""Family -> its pipeline, its denoiser's folder, and the configurations of the others. Source: the published repositories."""

COUNTED = {
    "SD3.5-medium": (7.06, 0.66), "SD3.5-large": (13.4, 1.12), "Sana 0.6B": (2.40, 0.15), "Sana 1.6B": (3.33, 0.26),
    "Sana 4.8B": (12.5, 0.47), "Stage C lite": (1.17, 0.19), "Stage C": (3.15, 0.47),
}  # fmt: skip
"""GiB of saved activations for a sample without and with recomputation, counted apart from this code by saved-tensor
hooks, which see no gradients and nothing that is freed at once."""


def written(folder: Path, family: str, denoiser: dict[str, Any]) -> Path:
    """A repository of small files only."""
    pipeline, place, others = REPOSITORIES[family]
    for name, content in {place: denoiser, **others}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(content))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def estimated(model: Path, family: str, folder: Path) -> Memory:
    options = {"lora_rank": 16, "lora_alpha": 16.0, "lora_dropout": 0.0, "gradient_checkpointing": True}
    run = made_run(model, folder, model_family=family, optimizer="adamw_bf16", **options)
    dtypes = Dtypes(base="bfloat16", trained="bfloat16", autocast=None, text="bfloat16", latents="float16")
    run = replace(run, dtypes=dtypes, hardware=Hardware("cuda", has_bf16=True))
    square = Largest((1024, 1024), 1)
    return memory_of(run, Workload([square], encoded=[square], prompts=8))


def main() -> None:
    asked = arguments(__doc__)
    figures = []
    with scratch() as folder:
        for name, (family, denoiser) in DENOISERS.items():
            model = written(folder / name, family, denoiser)
            began_s = time.process_time()
            memory = estimated(model, family, folder / "out")
            taken_s = time.process_time() - began_s
            *encoders, step = memory.stages
            plain, recomputed = COUNTED[name]
            figures += [
                Figure(f"{name}: weights in training", step.weights_bytes / GIB, "GiB"),
                Figure(f"{name}: at work, nothing recomputed", memory.otherwise.work_bytes / GIB, "GiB"),
                Figure(f"{name}: the same over saved activations", memory.otherwise.work_bytes / GIB / plain, "", 1.1, 0.8),
                Figure(f"{name}: at work, every block recomputed", step.work_bytes / GIB, "GiB"),
                Figure(f"{name}: the same over saved activations", step.work_bytes / GIB / recomputed, "", 1.2, 0.9),
                *(Figure(f"{name}: {each.name}", each.device_bytes / GIB, "GiB") for each in encoders),
                Figure(f"{name}: time of the estimate", taken_s, "CPU s", most=20),
            ]
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
