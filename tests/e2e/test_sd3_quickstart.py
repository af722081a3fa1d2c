"""The SD3 quickstart's blocks, as printed there, on tiny weights in folders of the real names; and its gated repository.

In this process and on one cache: each recipe is a matter of seconds.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from simpletuner.cli import main
from simpletuner.config.sources import read_json
from tests.e2e.conftest import Workspace
from tests.quickstarts import SD3_CONFIG, SD3_DATASETS, SD3_ENVIRONMENT, SD3_SKIP_LAYERS

CONFIGS = Path(__file__).parents[2] / "config"
SHORT = {
    "max_train_steps": 2,
    "log_step_interval": 1,
    "validation_resolution": "128x128",
    "validation_num_inference_steps": 6,
    "disable_benchmark": True,
}
"""What keeps a test short: nothing that the page sets, but for the size of the pictures."""


@pytest.fixture(autouse=True)
def _at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_repo: Callable[[str], Path]) -> Path:
    """A user's folder with the page's pictures, prompts and dataset file, and the models where the hub would be asked."""
    folder = tmp_path_factory.mktemp("sd3")
    for variant in ("medium", "large"):
        shutil.copytree(tiny_repo(f"sd3.5-{variant}"), folder / "stabilityai" / f"stable-diffusion-3.5-{variant}")
    pictures = folder / "datasets" / "pseudo-camera-10k"
    pictures.mkdir(parents=True)
    for number, size in enumerate([(160, 128), (128, 144)]):
        Image.linear_gradient("L").resize(size).rotate(40 * number).convert("RGB").save(pictures / f"a_slope_{number}.jpg")
    (folder / "config").mkdir()
    (folder / "config" / "user_prompt_library.json").write_text('{"dog": "a dog"}')
    entries = json.loads(SD3_DATASETS.replace("/home/user/simpletuner", str(folder)))
    # 1024 px would be 64 times the work for the same lines of code.
    entries[0] |= dict.fromkeys(("resolution", "maximum_image_size", "target_downsample_size"), 128)
    (folder / "config" / "multidatabackend.json").write_text(json.dumps(entries))
    return folder


def train(folder: Path, name: str, config: str | dict[str, object], *words: str) -> Path:
    """Train what the file `config/<name>` says, shortened; its output folder."""
    (folder / "config" / name).write_text(config if isinstance(config, str) else json.dumps(config))
    output = folder / "output" / Path(name).stem
    short = [f"--{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in SHORT.items()]
    assert main(["train", f"--config_file=config/{name}", *short, f"--output_dir={output}", *words]) == 0
    return output


def losses(output: Path) -> list[float]:
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "kind" not in row]


def template(name: str) -> dict[str, object]:
    content = read_json(CONFIGS / f"{name}.example", CONFIGS)
    content.pop("data_backend_config", None)
    return content


def with_skip_layers() -> dict[str, object]:
    """The page's config and its block for skip-layer guidance; of the two values of `validation_guidance` the block's."""
    config = json.loads(SD3_CONFIG)
    del config["validation_guidance"]
    return {**config, **json.loads(SD3_SKIP_LAYERS)}


def test_the_pages_config_trains_and_paints_all_its_prompts_in_all_its_sizes(folder: Path) -> None:
    output = train(folder, "page.json", SD3_CONFIG, "--validation_resolution=128x128,160x96")
    assert len(losses(output)) == 2
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    names = sorted(path.name for path in (output / "validation").iterdir())
    sizes = ("128x128", "160x96")
    assert names == [f"step_2_{name}_{size}.png" for name in ("dog_1", "validation_0") for size in sizes]
    with Image.open(output / "validation" / names[0]) as picture:
        assert isinstance(picture, PngImageFile)
        assert picture.info["guidance"] == "3.0"
    assert list((folder / "output/cache/vae/sd3/pseudo-camera-10k").rglob("shard-*.safetensors"))
    assert list((folder / "cache/text/sd3/pseudo-camera-10k").rglob("shard-*.safetensors"))


def test_skip_layer_guidance_changes_pictures_and_no_loss(folder: Path) -> None:
    """The tiny model has four blocks, so others are skipped than the page's."""
    page = {**with_skip_layers(), "model_flavour": "medium", "pretrained_model_name_or_path": None}
    page["--validation_guidance_skip_layers"] = [1, 2]
    plain = {key: value for key, value in page.items() if "skip" not in key}
    guided, unguided = train(folder, "slg.json", page), train(folder, "no-slg.json", plain)
    assert losses(guided) == losses(unguided)
    pictures = [Image.open(each / "validation" / "step_2_dog_1_128x128.png").tobytes() for each in (guided, unguided)]
    assert pictures[0] != pictures[1]


def test_skipping_blocks_that_a_model_does_not_have_is_told_before_any_work(folder: Path, capsys) -> None:
    (folder / "config" / "deep.json").write_text(json.dumps(with_skip_layers()))
    assert main(["check", "--config_file=config/deep.json"]) == 2
    assert "has 4 blocks, 0 to 3" in capsys.readouterr().err


def test_the_stable_recipe_trains(folder: Path) -> None:
    config = {**template("sd3-stable.json"), "validation_guidance_skip_layers": [1, 2]}
    assert len(losses(train(folder, "stable.json", config))) == 2


def test_the_low_memory_recipe_trains(folder: Path) -> None:
    assert len(losses(train(folder, "low-vram.json", template("sd3-low-vram.json")))) == 2


def test_the_environment_file_trains_as_pasted_with_its_stray_tag(folder: Path, capsys) -> None:
    """The block says nothing of model and pictures: those lines stand before it, in a file that had them already."""
    before = 'export MODEL_FAMILY="sd3"\nexport MODEL_NAME="stabilityai/stable-diffusion-3.5-large"\n'
    output = train(folder, "config.env", before + SD3_ENVIRONMENT)
    said = capsys.readouterr().err
    assert "</details>" in said
    resolved = json.loads((output / "config.json").read_text())
    assert (resolved["base_model_precision"], resolved["optimizer"]) == ("int8-quanto", "adamw_bf16")
    assert len(losses(output)) == 2


def test_a_full_fine_tune_ends_with_a_pipeline_that_the_stock_class_loads(folder: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    words = ("--model_type=full", "--optimizer=torch-adamw", "--learning_rate=1e-2", "--lr_scheduler=constant")
    output = train(folder, "full.json", SD3_CONFIG, *words)
    tuned, base = (
        StableDiffusion3Pipeline.from_pretrained(each).transformer.proj_out.weight
        for each in (output / "pipeline", folder / "stabilityai" / "stable-diffusion-3.5-large")
    )
    assert (tuned - base).abs().max() > 1e-3


class GatedHub(BaseHTTPRequestHandler):
    """Answers as the hub does to an account that has not accepted a repository's terms."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def gated_hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_without_access_check_says_which_page_to_accept_and_how_to_log_in(workspace: Workspace, gated_hub: str) -> None:
    workspace.config = {**json.loads(SD3_CONFIG), "user_prompt_library": None}
    workspace.environment = {"HF_ENDPOINT": gated_hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(workspace.folder / "hub")}
    said = workspace.run("check", expect=2)
    assert f"accept its terms at {gated_hub}/stabilityai/stable-diffusion-3.5-large" in said
    assert "hf auth login" in said
