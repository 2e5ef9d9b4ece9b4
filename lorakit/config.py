"""The settings of a run. Each default is defined here and nowhere else."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from lorakit import named

Kind = Literal["character", "style", "object", "clothing"]
BucketRule = Literal["kohya", "no_upscale", "least_crop"]  # explained in `lorakit.dataset.buckets`
KOHYA = re.compile(r"\b(network_dim|network_module|pretrained_model_name_or_path|LoRA_type)\"?\s*[:=]")  # its own names
WHOLE = ("loha", "lokr")  # algorithms that cannot train on a quantized base


class Config(BaseModel):
    """All settings of a run. Frozen; unknown settings are refused; `with_` returns a changed copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # Base and dataset
    base: str = Field(
        named.OF_FAMILY["sd15"].reference,
        description="a named base (sdxl, noobai-1.1 …), hub id, .safetensors checkpoint, diffusers folder, or 'demo'",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the base predicts; 'auto' reads it from the base's config"
    )
    zero_terminal_snr: bool = Field(False, description="the base was trained with zero terminal SNR")
    dataset: str = Field("dataset", description="folder or zip with pictures and captions")
    decisions: str | None = Field(None, description="file that lists pictures to leave out or replace")
    name: str = Field("lora", pattern=r"^[\w][\w .+-]*$", description="name of the LoRA file, without suffix")
    kind: Kind = Field("character", description="what the LoRA learns; presets and advice depend on it")
    trigger: str = Field("", description="trigger word, for metadata and sample prompts")

    # Pictures and captions
    resolution: int = Field(512, ge=32, le=4096, description="training size in pixels; buckets keep this area")
    bucket_step: int = Field(64, ge=8, description="bucket sides are multiples of this many pixels")
    bucket_rule: BucketRule = Field(
        "kohya",
        description="'kohya': nearest shape; 'no_upscale': never enlarge; 'least_crop': crop as little as possible",
    )
    min_bucket_side: int | None = Field(
        None, ge=1, description="shortest side of a bucket in pixels; None: half the resolution. Unused by 'no_upscale'"
    )
    max_bucket_side: int | None = Field(
        None, ge=1, description="longest side of a bucket in pixels; None: twice the resolution. Unused by 'no_upscale'"
    )
    repeats: int | None = Field(None, ge=1, description="of a picture in an epoch; None: from folder names (10_name)")
    flip: bool = Field(False, description="mirror half of the pictures at random")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of examples trained without a caption")
    shuffle_captions: bool = Field(False, description="shuffle comma-separated tags")
    keep_tokens: int = Field(0, ge=0, description="leading tags that are neither shuffled nor dropped")
    tag_dropout: float = Field(0.0, ge=0, lt=1, description="share of the other tags dropped at random")
    keep_tokens_separator: str = Field(
        "", description="tags in front of this sign ('|||'), and after a second one, are neither shuffled nor dropped"
    )
    secondary_separator: str = Field(
        "", description="sign (';;;') between tags that stay together when tags are shuffled and dropped"
    )
    caption_lines: Literal["join", "random"] = Field(
        "join", description="a caption of several lines: join them, or draw one for each example"
    )
    caption_choices: bool = Field(False, description="draw one text of each {a|b} in a caption; {{ and }} are braces")
    caption_variants: int = Field(16, ge=1, le=1000, description="versions encoded for each caption that varies")
    max_token_length: Literal[75, 150, 225] | None = Field(
        None, description="tokens read of a caption; None: as many as the longest one needs, up to 225"
    )
    clip_skip: int = Field(1, ge=1, le=4, description="layer of the text encoder: 1 is the last, 2 the one before it")
    mask: str | None = Field(
        None, description="'alpha', or a folder of masks named like the pictures; white areas are trained"
    )
    unmasked_weight: float = Field(0.0, ge=0, le=1, description="loss weight of black areas of a mask")

    # Prior preservation
    regularisation: str | None = Field(
        None, description="folder or zip with pictures of the class, captioned without the trigger"
    )
    prior_weight: float = Field(1.0, ge=0, description="loss weight of regularisation pictures; others have 1")
    prior_prediction: bool = Field(False, description="preserve the base's predictions for the class")
    class_word: str = Field("", description="class of the trigger ('woman'), for prior_prediction")

    # Adapter
    algorithm: Literal["lora", "dora", "loha", "lokr"] = Field(
        "lora", description="type of adapter; A1111, Forge and ComfyUI read all of them, diffusers only 'lora'"
    )
    lokr_factor: int | None = Field(
        None, ge=2, description="side of the smaller LoKr matrix; None: both as equal as possible"
    )
    rank: int = Field(32, ge=1, le=1024)
    alpha: float = Field(16, gt=0, description="scale is alpha / rank")
    rank_stabilized: bool = Field(False, description="rsLoRA: scale is alpha / √rank, for high ranks")
    train_unet: bool = Field(True, description="train the UNet; if off, only text encoders are trained")
    targets: Literal["attention", "attention+conv"] = Field(
        "attention", description="kohya's default modules, or also the ResNet convolutions (LoCon)"
    )
    conv_rank: int | None = Field(None, ge=1, le=1024, description="rank of convolutions; None: `rank`")
    conv_alpha: float | None = Field(None, gt=0, description="alpha of convolutions; None: `alpha`")
    block_ranks: dict[str, NonNegativeInt] = Field({}, description="ranks by block, {'mid_block': 8}; 0: not trained")
    initialisation: Literal["usual", "orthogonal", "eva"] = Field(
        "usual", description="initial weights: random, orthogonal, or principal directions of the layers' inputs (EVA)"
    )
    start_from: str | None = Field(None, description="LoRA file to continue from, with the same modules and ranks")

    # Optimizer
    steps: int | None = Field(None, ge=1, description="optimizer updates; set either steps or epochs")
    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(1, ge=1)
    micro_batch_size: int | None = Field(
        None, ge=1, description="pictures in one forward pass; None: the whole batch. The result is the same"
    )
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0, le=1)
    text_encoder_rate: float = Field(0.0, ge=0, le=1, description="learning rate of the text encoders; 0: not trained")
    text_encoder_2_rate: float | None = Field(
        None, ge=0, le=1, description="learning rate of SDXL's second text encoder; None: `text_encoder_rate`"
    )
    learning_rate_ratio: float = Field(1.0, gt=0, description="LoRA+: learning rate of up over down matrices")
    optimizer: Literal[
        "adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "prodigy", "lion", "adamw_schedulefree"
    ] = "adamw"
    weight_decay: float = Field(0.01, ge=0)
    block_rates: dict[str, NonNegativeFloat] = Field(
        {}, description="factors on the learning rate by block, {'down_blocks': 0.5}"
    )
    schedule: Literal["constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"] = (
        "constant"
    )
    schedule_cycles: int = Field(1, ge=1, description="cycles of 'cosine_with_restarts'")
    schedule_power: float = Field(1.0, gt=0, description="power of 'polynomial'")
    warmup_steps: float = Field(0, ge=0, description="steps, or a share of the run if below 1")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0: not clipped")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="moving average of the adapter (0.999); None: none")

    # Loss
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    huber_delta: float = Field(0.1, gt=0, description="error above which 'huber' and 'smooth_l1' are linear")
    min_snr_gamma: float | None = Field(
        5.0, gt=0, description="Min-SNR loss weighting; None: all timesteps weigh the same"
    )
    debiased: bool = Field(False, description="debiased loss weighting instead of Min-SNR")
    noise_offset: float = Field(0.0, ge=0, le=1)
    multires_noise_iterations: int = Field(0, ge=0, le=10, description="levels of coarser noise; 6 is common")
    multires_noise_discount: float = Field(0.3, gt=0, lt=1)
    input_perturbation: float = Field(
        0.0, ge=0, le=1, description="extra noise in the UNet's input that is not in the target; 0.1 is common"
    )
    min_timestep: int = Field(0, ge=0, le=999)
    max_timestep: int = Field(1000, ge=1, le=1000, description="exclusive")
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    timestep_shift: float = Field(0.0, ge=-5, le=5, description="mean of 'logit_normal': above 0 samples more noise")
    seed: int = Field(42, ge=0, lt=2**32)

    # Device and memory
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="quantize the base's transformers (bitsandbytes): less memory, slightly less exact"
    )
    fit_memory: bool = Field(
        True, description="reduce memory automatically when the run does not fit or runs out of memory"
    )

    # Checkpoints, validation and samples
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    save_minutes: float = Field(5.0, ge=0, description="also save after this many minutes; 0: never")
    keep_states: int = Field(3, ge=1, description="resumable checkpoints; older ones contain only adapter weights")
    keep_checkpoints: int | None = Field(None, ge=1, description="number of checkpoints to keep; None: all")
    backup: str | None = Field(
        None, description="where to copy checkpoints: a folder (Drive, /workspace) or 'hub:owner/name'"
    )
    validation_share: float = Field(0.0, ge=0, le=0.5, description="share of the pictures held out for validation")
    validation_pictures: tuple[str, ...] = Field((), description="file names of pictures held out for validation")
    validate_every: int = Field(100, ge=1, description="steps between validations")
    sample_every: int = Field(500, ge=1, description="steps between samples")
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = Field(25, ge=1, le=1000)
    sample_guidance: float = Field(7.0, ge=1)

    @pydantic.field_validator("sample_prompts", mode="before")
    @classmethod
    def _one_prompt_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        low = self.resolution // self.bucket_step * self.bucket_step
        prodigy, schedule_free = self.optimizer == "prodigy", self.optimizer == "adamw_schedulefree"
        initialised = "start_from" if self.start_from else f"algorithm {self.algorithm!r}"
        checks = (
            ("token=" in self.base,
             "the address of the base contains a token, which would be written into files: leave it out, and set "
             "CIVITAI_TOKEN"),
            ((self.steps is None) == (self.epochs is None),
             f"steps is {self.steps} and epochs is {self.epochs}: set one of them. Steps count optimizer updates, "
             "epochs count passes over pictures × repeats"),
            (self.resolution % self.bucket_step,
             f"resolution {self.resolution} is not a multiple of bucket_step {self.bucket_step}: use "
             f"{low or self.bucket_step} or {low + self.bucket_step}"),
            (not (self.min_bucket_side or 0) <= self.resolution <= (self.max_bucket_side or self.resolution),
             f"resolution {self.resolution} is not between min_bucket_side {self.min_bucket_side} and max_bucket_side "
             f"{self.max_bucket_side}: change them, or set them to null"),
            (self.min_timestep >= self.max_timestep,
             f"min_timestep {self.min_timestep} is not below max_timestep {self.max_timestep}"),
            (self.warmup_steps > 1 and self.warmup_steps % 1,
             f"warmup_steps {self.warmup_steps} is neither a whole number nor a share below 1"),
            (self.schedule == "constant" and self.warmup_steps,
             "schedule 'constant' has no warmup: set warmup_steps to 0 or use 'constant_with_warmup'"),
            (prodigy and self.learning_rate < 0.1,
             f"learning_rate {self.learning_rate} is too low for optimizer 'prodigy', which finds the rate itself and "
             "multiplies it by this one: use 1.0"),
            (prodigy and self.several_rates,
             "optimizer 'prodigy' needs one rate for all weights: set learning_rate_ratio to 1, leave block_rates "
             "empty, and give trained text encoders the learning_rate of the UNet"),
            (schedule_free and not self.schedule.startswith("constant"),
             f"optimizer 'adamw_schedulefree' does not work with schedule {self.schedule!r}: use 'constant' or "
             "'constant_with_warmup'"),
            (schedule_free and self.ema_decay,
             "optimizer 'adamw_schedulefree' averages the weights itself: set ema_decay to null"),
            (self.debiased and self.min_snr_gamma is not None,
             "debiased and min_snr_gamma both weight the loss: set min_snr_gamma to null"),
            (self.asks_class and not (self.trigger and self.class_word),
             "prior_prediction without regularisation pictures replaces the trigger by class_word in each caption: set "
             f"both (trigger is {self.trigger!r}, class_word {self.class_word!r})"),
            (self.quantize != "none" and self.algorithm in WHOLE,
             f"algorithm {self.algorithm!r} cannot be trained on a quantized base: set quantize to 'none', or use "
             "'lora' or 'dora'"),
            (self.initialisation != "usual" and (self.start_from or self.algorithm in WHOLE),
             f"initialisation {self.initialisation!r} does not work with {initialised}: set it to 'usual'"),
            (not self.train_unet and not any((self.text_encoder_rate, self.text_encoder_2_rate)),
             "train_unet is off and no text encoder has a learning rate: nothing would be trained"),
        )  # fmt: skip
        if problems := [problem for wrong, problem in checks if wrong]:
            raise ValueError("; ".join(problems) + ".")
        return self

    @property
    def at_once(self) -> int:
        """Pictures in one forward pass."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    @property
    def several_rates(self) -> bool:
        """Whether weights have different learning rates."""
        text = {self.text_encoder_rate, self.text_encoder_2_rate or 0.0} - {0.0, self.learning_rate}
        return bool(text or self.block_rates) or self.learning_rate_ratio != 1

    def text_rates(self, encoders: Sequence[str]) -> dict[str, float]:
        """The learning rates of the text encoders that are trained.

        Args:
            encoders: the base's, `Base.text_encoders`.

        Raises:
            ValueError: text_encoder_2_rate is set for a base with one text encoder.
        """
        if self.text_encoder_2_rate is not None and "text_encoder_2" not in encoders:
            raise ValueError("text_encoder_2_rate is set, but this base has one text encoder: use text_encoder_rate.")
        second = self.text_encoder_rate if self.text_encoder_2_rate is None else self.text_encoder_2_rate
        rates = {name: second if name == "text_encoder_2" else self.text_encoder_rate for name in encoders}
        return {name: rate for name, rate in rates.items() if rate}

    @property
    def asks_class(self) -> bool:
        """Whether the base's prediction for the class caption of each picture is preserved too."""
        return self.prior_prediction and not self.regularisation

    def with_(self, **changes: Any) -> "Config":
        """A copy with other settings; `steps` clears `epochs` and the reverse. Errors as `parse`."""
        settings = self.model_dump()
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if changes.get(name) is not None and other not in changes:
                settings[other] = None
        return parse(settings | changes)

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer updates of the whole run, counted as kohya does: batches of all epochs, then accumulated.

        Args:
            batches_per_epoch: batches in one pass over pictures × repeats.
        """
        if self.steps is not None:
            return self.steps
        return math.ceil(batches_per_epoch / self.gradient_accumulation_steps) * (self.epochs or 0)

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    # ── Shown ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _changed(self) -> dict[str, Any]:
        """The base, and the settings that differ from the defaults."""
        fields = type(self).model_fields
        return {name: value for name, value in self if name == "base" or value != fields[name].default}

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        yield from self._changed().items()

    def __str__(self) -> str:
        changed = self._changed()
        return f"{_lines(changed)}\n{len(type(self).model_fields) - len(changed)} other settings have their defaults"

    def _repr_html_(self) -> str:
        changed = self._changed()
        defaults = {name: value for name, value in self if name not in changed}
        folded = f"<details><summary>{len(defaults)} defaults</summary><pre>{escape(_lines(defaults))}</pre></details>"
        return f"<pre>{escape(_lines(changed))}</pre>{folded}"


def _lines(settings: dict[str, Any]) -> str:
    return "\n".join(f"{name:<28}{value}" for name, value in settings.items())


def load(path: str | Path) -> Config:
    """Read a config from a JSON file. Relative paths are also looked up in the file's own folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, an unknown setting or a bad value; names every problem.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}. `python -m lorakit preset` writes one to start from.")
    settings = read_settings(path)
    for key in ("base", "dataset", "decisions", "mask", "regularisation", "start_from"):
        neighbour = path.parent / str(settings.get(key, ""))
        if settings.get(key) and not Path(settings[key]).exists() and neighbour.exists():
            settings[key] = str(neighbour)
    return parse(settings, where=str(path))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file, not validated. ValueError: not a JSON object, or kohya's settings."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if KOHYA.search(text):
        raise ValueError(
            f"{path.name} has settings of kohya's sd-scripts. Convert them, `python -m lorakit kohya {path.name} > "
            "run.json`, then train with run.json."
        )
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} contains a {type(settings).__name__}, not the settings of a run in {{…}}.")
    return settings


def parse(settings: dict[str, Any], where: str = "the settings") -> Config:
    """A Config; every problem is reported in plain words.

    Raises:
        ValueError: an unknown setting (with the nearest known one) or a bad value.
    """
    try:
        return Config(**settings)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_explain(e) for e in error.errors()) + ".") from None


def _explain(error: Any) -> str:
    from difflib import get_close_matches

    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(name, Config.model_fields, 1, 0.5)
        return f"unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{name} = {error['input']!r}: {message}" if name else message


def is_place(base: str) -> bool:
    """Whether a base is, or looks like, a folder or file instead of a named base or one on the hub."""
    if base.startswith("https://") or named.find(base):
        return False
    path_like = base.startswith((".", "~", "/")) or "\\" in base or base.count("/") > 1
    file = base.lower().endswith((".safetensors", ".ckpt"))
    return base != "demo" and (path_like or file or Path(base).expanduser().exists())
