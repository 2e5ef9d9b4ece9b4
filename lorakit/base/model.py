"""The frozen Stable Diffusion model: recognise it, load its components, encode prompts.

A base is opened without reading a weight. Its components are loaded one at a time, in their compute dtype, and freed
by the caller. Every size (VAE factor, widths, prediction type) comes from the base's own configs.
"""

import hashlib
import importlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import named, storage
from lorakit.base import quantization, single_file
from lorakit.console import Console
from lorakit.device import Compute, quiet_libraries

DEMO = Path(__file__).parents[1] / "demo" / "base"
FAMILIES = Path(__file__).parents[1] / "families"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
CLASSES = {  # component → its library and class
    "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}  # fmt: skip
PICKLES = (".ckpt", ".bin", ".pt", ".pth")

# On every CPU, bitsandbytes warns about a missing GPU kernel for 4 bits as soon as PEFT imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Base:
    """A Stable Diffusion model, described by its configs."""

    folder: Path  # a diffusers folder on this machine
    name: str  # hub id, or the name of the folder or file: never a path
    family: str  # "sd15", "sd2" or "sdxl"
    configs: dict[str, dict[str, Any]] = field(repr=False)  # component → its config
    file: Path | None = None  # a single checkpoint with all weights; `folder` then has only the family's tokenizer
    half: bool = False  # prefer weights in float16: half as much to fetch from the hub

    @property
    def prediction_type(self) -> str:
        return self.configs["scheduler"].get("prediction_type", "epsilon")

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return self.configs["vae"]["latent_channels"]

    @property
    def resolution(self) -> int:
        """The side of the square pictures the base was trained on, in pixels."""
        return (self.configs["unet"].get("sample_size") or 64) * self.vae_factor

    @property
    def step(self) -> int:
        """Picture sides must be multiples of this many pixels."""
        return self.vae_factor * 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2") if self.family == "sdxl" else ("text_encoder",)

    @storage.exclusive
    def alphas_cumprod(self) -> Tensor:
        """The base's noise schedule, shape (1000,), float32."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.configs["scheduler"]).alphas_cumprod


def open(  # noqa: A001 - callers write base.open
    reference: str | Path, prediction_type: str = "auto", zero_terminal_snr: bool = False, half: bool | None = None,
    console: Console | None = None,
) -> Base:  # fmt: skip
    """Recognise a base from its configs, or a single checkpoint file from its keys.

    Args:
        reference: a diffusers folder, a hub id ("owner/name"; its small config files are fetched), one
            `.safetensors` file with UNet, text encoder and VAE, such a file on the hub ("owner/name/file.safetensors",
            or its page's address; it is fetched), the address of a model or version on Civitai (fetched too; its token
            is in the variable CIVITAI_TOKEN), a name of `named.NAMED`, or "demo".
        prediction_type: "epsilon" or "v_prediction"; "auto" reads it from the base.
        zero_terminal_snr: the base was trained on a noise schedule that ends in pure noise.
        half: prefer weights in float16 where the Hub has them; None does where this machine computes in half precision.
        console: shows the download from Civitai, which its `stop` ends; what has arrived is kept.

    Raises:
        FileNotFoundError: no such folder or file, and no hub id or address that can be reached.
        PermissionError: Civitai wants a token.
        ValueError: not a Stable Diffusion 1.x, 2.x or XL base, or its weights are pickles.

    Source: Lin et al. 2023, arXiv:2305.08891 (zero terminal SNR).
    """
    if prediction_type not in ("auto", "epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {prediction_type!r} is unknown. Use 'auto', 'epsilon' or 'v_prediction'.")
    base = _open(str(reference), console or Console())
    schedule = base.configs["scheduler"] | ({"rescale_betas_zero_snr": True} if zero_terminal_snr else {})
    half = Compute.choose().half if half is None else half
    base = replace(base, configs=base.configs | {"scheduler": schedule}, half=half)
    return base if prediction_type == "auto" else predicting(base, prediction_type)


def predicting(base: Base, prediction_type: str) -> Base:
    """The base with another prediction type than its files say."""
    schedule = base.configs["scheduler"] | {"prediction_type": prediction_type}
    return replace(base, configs=base.configs | {"scheduler": schedule})


def _open(reference: str, console: Console) -> Base:
    folder = DEMO if reference == "demo" else Path(reference).expanduser()
    if folder.is_file():
        return _open_file(folder)
    if storage.is_civitai(reference):
        with console.bar() as bar:
            return _open_file(storage.fetch_civitai(reference, console.say, bar))
    if not folder.exists() and (entry := named.find(reference)):
        reference = entry.reference
    if (of_hub := storage.hub_file(reference)) and not folder.exists():
        return _open_file(storage.fetch_hub_file(*of_hub))
    on_hub = storage.is_hub_id(reference) and not folder.is_dir()
    name = "lorakit/demo" if reference == "demo" else reference if on_hub else folder.resolve().name
    if not folder.is_dir():
        if not on_hub:
            raise FileNotFoundError(
                f"There is no base {reference!r}. Give a diffusers folder, a checkpoint's .safetensors file, a hub id "
                "such as 'stable-diffusion-v1-5/stable-diffusion-v1-5', a file on the hub such as "
                f"'owner/name/model.safetensors', {', '.join(named.NAMED)}, or 'demo'."
            )
        folder = storage.fetch_from_hub(reference, ["model_index.json", "*/*config.json"])
    configs = {}
    for component in ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2"):
        for file in ("config.json", "scheduler_config.json"):
            if (folder / component / file).is_file():
                configs[component] = _read_json(folder / component / file)
    if quantized := [component for component, config in configs.items() if "quantization_config" in config]:
        raise ValueError(
            f"{reference} has the weights of its {', '.join(quantized)} in quantized form, which only makes pictures. "
            "Get the base in fp16 or bf16; `quantize` holds it in fewer bits while a LoRA is trained."
        )
    missing = [c for c in ("unet", "vae", "scheduler", "text_encoder") if c not in configs]
    unet = configs.get("unet", {}).get("_class_name", "")
    if missing or unet != "UNet2DConditionModel":
        raise ValueError(
            f"{reference} is not a Stable Diffusion base: "
            + (f"it has no {', '.join(missing)} config" if missing else f"its UNet is {unet or 'unknown'}")
            + (f"; give the file {files[0].name} in it" if (files := sorted(folder.glob("*.safetensors"))) else "")
            + ". lorakit trains SD 1.x, SD 2.x and SDXL in diffusers' folder form (model_index.json, unet/, vae/, …)."
        )
    schedule = configs["scheduler"]
    kind, predicts = schedule.get("_class_name", ""), schedule.get("prediction_type", "epsilon")
    if re.search("EDM|Flow", kind) or predicts not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{reference} was trained for another noise schedule ({kind}, predicts {predicts}) than those of Stable "
            "Diffusion, which predict epsilon or v: lorakit cannot train it. Use another base."
        )
    channels, expected = configs["unet"]["in_channels"], configs["vae"]["latent_channels"]
    if channels != expected:
        raise ValueError(
            f"{reference} takes {channels} channels, not the {expected} of its latents: "
            "inpainting and depth bases cannot be trained. Use the plain text-to-image base."
        )
    return Base(folder, name, _family(configs, reference), configs)


def known(name: str) -> Base:
    """A named base, by its name or reference, without weights: for planning before a download.

    Raises:
        ValueError: unknown name.
    """
    entry = named.find(name)
    if entry is None:
        raise ValueError(f"lorakit has no configs of {name!r}. It has {', '.join(named.NAMED)}; or give a folder.")
    base = Base(FAMILIES, entry.reference, entry.family, _read_json(FAMILIES / f"{entry.configs}.json"))
    return predicting(base, entry.settings.get("prediction_type", base.prediction_type))


def _open_file(file: Path) -> Base:
    if file.suffix.lower() in PICKLES:
        raise ValueError(
            f"{file.name} is a pickle: loading it can run any program hidden in it, so lorakit never does. "
            "Get the .safetensors form of the same model, or its diffusers folder."
        )
    short, schedule = single_file.recognise(file)
    base = known(short)
    configs = base.configs | {"scheduler": base.configs["scheduler"] | schedule}
    return replace(base, name=file.name, configs=configs, file=file)


def _read_json(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        problem = storage.disguise(content[:64]) or f"damaged ({error})"
        raise ValueError(f"{path.parent.name}/{path.name} of the base is {problem}. Fetch it again.") from error


def _family(configs: dict[str, dict[str, Any]], reference: str) -> str:
    """The family by the structure of the UNet, not by its size, so that a small model counts as its family."""
    unet = configs["unet"]
    if unet.get("addition_embed_type") == "text_time":
        if "text_encoder_2" not in configs:
            raise ValueError(f"{reference} is the SDXL refiner, or lacks text_encoder_2. Train on the SDXL base.")
        return "sdxl"
    if unet.get("addition_embed_type") or unet.get("class_embed_type"):
        raise ValueError(f"{reference} needs conditions other than text (unCLIP, upscaler …); lorakit cannot train it.")
    return "sd2" if unet.get("use_linear_projection") else "sd15"


def _from_hub(base: Base) -> bool:
    """Whether the base was opened by its hub id, so that its folder may not contain all files yet."""
    return storage.is_hub_id(base.name) and base.folder not in (DEMO, Path(base.name))


def component_folders(base: Base) -> list[Path]:
    """The folders of all components of the base's pipeline; missing files are fetched from the hub."""
    index = base.folder / "model_index.json"
    components = _read_json(index) if index.is_file() else {path.name: [path.name] for path in base.folder.iterdir()}
    names = [n for n, kind in components.items() if isinstance(kind, list) and kind[0] and n[0] not in "._"]
    if _from_hub(base):
        patterns = ("*.json", "*.txt", *_weight_names(""))
        storage.fetch_from_hub(base.name, [f"{name}/{pattern}" for name in names for pattern in patterns])
    return sorted(base.folder / name for name in names if (base.folder / name).is_dir())


def weight_files(base: Base, component: str) -> list[Path]:
    """A component's safetensors files, of one precision; missing ones are fetched from the hub.

    Where the base is opened in half precision, the form "fp16" is preferred: half as much to fetch. The VAE is always
    whole, because of its float32 computation.

    Raises:
        FileNotFoundError: no safetensors weights (names a pickle in the folder), or a file of the index is missing.
    """
    folder = base.folder / component
    forms = (".fp16", "") if base.half and component != "vae" else ("",)
    for form in forms:
        if files := _files_of_form(folder, form):
            return files
    for form in forms if _from_hub(base) else ():
        storage.fetch_from_hub(base.name, [f"{component}/{name}" for name in _weight_names(form)])
        if files := _files_of_form(folder, form):
            return files
    if files := _files_of_form(folder, ".fp16") or sorted(folder.glob("*.safetensors")):
        return files
    pickles = [f.name for f in folder.glob("*") if f.suffix.lower() in PICKLES]
    raise FileNotFoundError(
        f"{component}/ of {base.name} contains no .safetensors weights"
        + (f", only the pickle {pickles[0]}, which lorakit never loads" if pickles else "")
        + ". Use the safetensors form of this base."
    )


def _weight_names(form: str) -> list[str]:
    """Patterns of the names of weights in a form, "" or ".fp16"."""
    names = (*WEIGHTS, "diffusion_pytorch_model-*.safetensors", "model-*.safetensors", "*.safetensors.index.json")
    return [re.sub(r"(?=-\*|(?<!\*)\.safetensors$|\.json$)", form, name) for name in names]


def _files_of_form(folder: Path, form: str) -> list[Path]:
    """The weights in a folder, in a form ("" or ".fp16"): those in its index, else the one with the usual name."""
    for index in folder.glob(f"*.safetensors.index{form}.json"):
        files = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{folder.name}/ lacks {', '.join(missing)}. Copy or fetch it again.")
        return files
    return [file for name in _weight_names(form) if (file := folder / name).is_file()][:1]


def weight_places(base: Base, component: str) -> dict[str, single_file.WeightPlace]:
    """The location of a component's weights, by diffusers' names (a text encoder's without `text_model.`)."""
    if base.file:
        return single_file.places(base.file, base.family, component)
    return {name: x for file in weight_files(base, component) for name, x in single_file.places(file).items()}


def identity(base: Base) -> str:
    """A digest of the weights of UNet and text encoders, hex: the same wherever the base is, and whatever its name.

    It covers the first row of each weight in float16, which tells any two fine-tuned bases apart and is the same for
    the forms of a base: folder or file, float32 or float16.
    """
    digest = hashlib.sha256()
    for which in ("unet", *base.text_encoders):
        rows = dict(_first_rows(weight_places(base, which)))
        for name in sorted(rows):
            digest.update(name.encode() + rows[name].flatten().to(torch.float16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_rows(places: Mapping[str, single_file.WeightPlace]) -> Iterator[tuple[str, Tensor]]:
    """The first row of each weight, without biases, and without those that a file has in another order."""
    by_file: dict[Path, dict[str, single_file.WeightPlace]] = defaultdict(dict)
    for name, place in places.items():
        if len(place.shape) > 1 and not name.endswith(("position_ids", "text_projection.weight")):
            by_file[place.file][name] = place
    for file, of_file in by_file.items():
        with storage.open_safetensors(file) as handle:
            for name, place in of_file.items():
                yield name, handle.get_slice(place.key)[place.part * place.shape[0]]


def fingerprint(base: Base, component: str) -> str:
    """A digest of a component's weights and config, hex: part of every cache key."""
    digest = hashlib.sha256(json.dumps(base.configs[component], sort_keys=True).encode())
    if base.file:
        for key, tensor in single_file.raw(base.file, base.family, component):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()
    for file in weight_files(base, component):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _class(component: str) -> Any:
    library, name = CLASSES[component]
    return getattr(importlib.import_module(library), name)


def _from_config(component: str, config: dict[str, Any]) -> Any:
    cls = _class(component)
    return cls.from_config(config) if hasattr(cls, "from_config") else cls(cls.config_class(**config))


def _load(base: Base, component: str, compute: Compute) -> Any:
    files = [] if base.file else weight_files(base, component)  # may download, which others need not wait for
    for file in files:
        with storage.open_safetensors(file):  # its errors say what a file is; the library's own do not
            pass
    with storage.LOADING:
        quiet_libraries()
        if files:
            # `torch_dtype` works in every release; newer ones call it `dtype` and accept both.
            options: dict[str, Any] = {"torch_dtype": compute.dtype, "use_safetensors": True, "local_files_only": True}
            variant = "fp16" if ".fp16" in files[0].name else None
            model = _class(component).from_pretrained(files[0].parent, variant=variant, **options)
        else:
            model = _load_from_file(base, component, compute)
        return model.requires_grad_(False).eval().to(compute.device)


def _load_from_file(base: Base, component: str, compute: Compute) -> Any:
    """Make an empty model, then convert and move its weights one by one; ValueError if they do not fit."""
    from accelerate import init_empty_weights

    assert base.file
    with init_empty_weights(include_buffers=False):
        model = _from_config(component, base.configs[component])
    inner = "text_model." if hasattr(model, "text_model") else ""  # newer transformers have no inner text_model
    paths = {name.removeprefix(inner): name for name, _ in model.named_parameters()}
    shapes = {name: model.get_parameter(path).shape for name, path in paths.items()}
    # Copied, because memory-mapped tensors become invalid when the file is closed.
    state = {
        name: tensor.to(compute.device, compute.dtype, copy=True)
        for name, tensor in single_file.tensors(base.file, base.family, component, shapes)
    }
    read = {name: tuple(state[name].shape) if name in state else "missing" for name in paths}
    if wrong := [f"{name} is {read[name]}, not {tuple(shapes[name])}" for name in paths if read[name] != shapes[name]]:
        raise ValueError(
            f"{base.name} does not contain the {component} of {base.family}: {len(wrong)} of {len(paths)} weights do "
            f"not fit, first {wrong[0]}. It is damaged, or another kind of model; try its diffusers folder."
        )
    model.load_state_dict({paths[name]: tensor for name, tensor in state.items()}, strict=False, assign=True)
    return model


@storage.exclusive
def empty(base: Base, component: str) -> torch.nn.Module:
    """A component on the meta device, without weights."""
    quiet_libraries()
    with torch.device("meta"):
        return _from_config(component, base.configs[component])


def load_unet(base: Base, compute: Compute) -> Any:
    """Load the frozen UNet (diffusers' UNet2DConditionModel), quantized as `compute.quantize` says.

    Raises:
        ValueError, ImportError: the UNet cannot be quantized on this machine.
    """
    if compute.quantize == "none":
        return _load(base, "unet", compute)
    unet = _load(base, "unet", replace(compute, device=torch.device("cpu")))
    with storage.LOADING:
        return quantization.quantize(unet, compute.quantize, compute.device)


def load_vae(base: Base, compute: Compute) -> Any:
    """Load the frozen autoencoder, in float32 if its config says that it overflows in half precision (SDXL)."""
    if compute.dtype == torch.float16 and base.configs["vae"].get("force_upcast", True):
        compute = replace(compute, dtype=torch.float32)
    return _load(base, "vae", compute)


def load_text_encoder(base: Base, compute: Compute, name: str = "text_encoder") -> tuple[Any, Any]:
    """Load a frozen text encoder ("text_encoder", or SDXL's "text_encoder_2") and its tokenizer."""
    return _load(base, name, compute), load_tokenizer(base, name)


@storage.exclusive
def load_tokenizer(base: Base, encoder: str = "text_encoder") -> Any:
    """The tokenizer of one of the base's text encoders."""
    from transformers import CLIPTokenizer

    if base.file:
        # OpenCLIP (the encoder of SD 2.x and the second one of SDXL) pads with token 0.
        open_clip = base.family == "sd2" or encoder == "text_encoder_2"
        padding: dict[str, Any] = {"pad_token": "!"} if open_clip else {}
        return CLIPTokenizer.from_pretrained(FAMILIES / "tokenizer", local_files_only=True, **padding)
    folder = base.folder / encoder.replace("text_encoder", "tokenizer")
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        storage.fetch_from_hub(base.name, [f"{folder.name}/*"])
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def tokenize(tokenizer: Any, prompts: Sequence[str], chunks: int = 1) -> Tensor:
    """Prompts as tokens, (B, chunks · length), int64; length is the tokenizer's, 77 in all published bases.

    Each chunk has its own marks for beginning and end, and up to 75 tokens between them. What exceeds the last one is
    left out.

    Source: sd-scripts (`max_token_length`), whose chunks are the same.
    """
    length, ends = tokenizer.model_max_length, (tokenizer.bos_token_id, tokenizer.eos_token_id)
    room, rows = length - 2, []
    read = tokenizer(list(prompts), truncation=True, max_length=chunks * room + 2, verbose=False).input_ids
    for ids in (row[1:-1] for row in read):
        parts = [[ends[0], *ids[at : at + room], ends[1]] for at in range(0, chunks * room, room)]
        rows.append([token for part in parts for token in part + [tokenizer.pad_token_id] * (length - len(part))])
    return torch.tensor(rows)


def tokens_needed(base: Base, texts: Collection[str]) -> dict[str, int]:
    """The number of tokens of each text that may have more than a text encoder reads at once; others are left out."""
    room = token_limit(base)
    long = [text for text in texts if len(text.encode()) > room]  # a token has at least one byte
    if not long:
        return {}
    ids = load_tokenizer(base)(long, truncation=False, verbose=False).input_ids
    return {text: len(tokens) - 2 for text, tokens in zip(long, ids, strict=True)}


def token_limit(base: Base) -> int:
    """How many tokens the base's text encoders read at once, without the marks for beginning and end."""
    return min(base.configs[encoder].get("max_position_embeddings", 77) for encoder in base.text_encoders) - 2


def encode(
    encoder: Any, tokens: Tensor, family: str, clip_skip: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Text embeddings from one text encoder as the family's UNet expects them, differentiable.

    Tokens of several chunks are encoded chunk by chunk, and the embeddings put side by side, as in A1111 and ComfyUI.

    Args:
        tokens: (B, chunks · length), on the encoder's device.
        clip_skip: 1 takes the last layer, 2 the one before, … SDXL always counts from its next-to-last.
        mask: (B, length), 0 for tokens to ignore; None attends to all tokens, padding too, as these bases do.

    Returns:
        Embeddings, shape (B, chunks · length, width); pooled embedding of the first chunk, (B, width or projection).
    """
    length = encoder.config.max_position_embeddings
    if (chunks := tokens.shape[1] // length) > 1:
        embeddings, pooled = encode(encoder, tokens.reshape(-1, length), family, clip_skip, mask)
        return embeddings.reshape(len(tokens), chunks * length, -1), pooled[::chunks]
    output = encoder(tokens, attention_mask=mask, output_hidden_states=True)
    if family == "sdxl":
        return output.hidden_states[-(clip_skip + 1)], output[0]
    if clip_skip == 1:
        return output.last_hidden_state, output.pooler_output
    inner = getattr(encoder, "text_model", encoder)  # newer transformers have no inner text_model
    return inner.final_layer_norm(output.hidden_states[-clip_skip]), output.pooler_output


def reencode(
    base: Base, encoders: Mapping[str, torch.nn.Module], embeddings: Tensor, pooled: Tensor, tokens: Tensor,
    clip_skip: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Replace the embeddings of the given text encoders with newly computed ones; the others stay.

    Args:
        encoders: name → encoder, any of the base's.
        embeddings: (B, chunks · length, width), concatenated from all the base's encoders.
        pooled: (B, width), from the last one.
        tokens: (B, encoders, chunks · length), int64.

    Returns:
        Embeddings and pooled embeddings, of the same shapes.
    """
    parts = list(embeddings.split([base.configs[name]["hidden_size"] for name in base.text_encoders], dim=-1))
    for place, name in enumerate(base.text_encoders):
        if name in encoders:
            parts[place], pool = encode(encoders[name], tokens[:, place], base.family, clip_skip)
            pooled = pool if name == base.text_encoders[-1] else pooled
    return torch.cat([part.to(embeddings.dtype) for part in parts], dim=-1), pooled


def ask(unet: Any, noisy: Tensor, timesteps: Tensor, texts: tuple[Tensor, Tensor], sizes: Tensor | None) -> Tensor:
    """The UNet's answer about noisy latents (B, C, h, w), of their shape.

    Args:
        texts: embeddings (B, tokens, width) and pooled embeddings (B, width).
        sizes: SDXL's `size_conditions` (B, 6); None for the other families.
    """
    conditions = None if sizes is None else {"text_embeds": texts[1], "time_ids": sizes}
    return unet(noisy, timesteps, texts[0], added_cond_kwargs=conditions).sample


def size_conditions(original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """SDXL's size conditions, shape (6,), float32: (height, width) before scaling, (top, left) and (height, width) of
    the crop, in pixels.

    Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """
    return torch.tensor([*original, *crop, *size], dtype=torch.float32)
